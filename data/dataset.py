"""The training set of a run: what the data roots hold, each picture with its bucket, and the plan of every epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from data.batches import caption_of
from data.buckets import compute_buckets, fit_buckets, nearest_bucket
from data.checks import Memory, check_pictures, find_duplicates
from data.folder import Found
from data.index import index_path
from data.item import Bucket, Item, Update, Visit
from data.lengths import CutCaption
from data.plan import Placed, count_updates, epochs_begun, plan_epoch, select_rated
from data.report import Report, describe_data
from data.sources import find_data, sources
from data.validation import WatchedSet, arrange
from data.validation_file import ValidationFile, validation_updates
from utils.config import DataOptions
from utils.errors import UserError, printable
from utils.progress import counted

NO_VALIDATION = ValidationFile(validate_training=False)


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Pictures and how they are trained; everything about it follows from the options and the files.

    Args:
        epochs: of the run, which a rated data set looks at.
        buckets: those that pictures may be cut to.
        placed: the pictures that are trained, each with its bucket.
        watched: those that validation looks at.
        updates: of each epoch, `max_steps` not yet counted.
        total_updates: of the run.
        validation: the updates after which validation is due.
        notes: lines for the log.
        duplicates: pictures that are there more than once, in groups.
    """

    options: DataOptions
    seed: int
    epochs: int
    found: Found
    buckets: tuple[Bucket, ...]
    placed: tuple[Placed, ...]
    watched: tuple[WatchedSet, ...]
    updates: tuple[int, ...]
    total_updates: int
    validation: frozenset[int]
    notes: tuple[str, ...] = ()
    duplicates: tuple[tuple[Item, ...], ...] = ()

    def plan(self, epoch: int) -> tuple[Update, ...]:
        """The updates of `epoch`, from 0."""
        options, placed = self.options, self.placed
        if options.rated_dataset:
            percent = options.rated_dataset_target_dropout_percent
            placed = select_rated(placed, target_percent=percent, seed=self.seed, epoch=epoch, epochs=self.epochs)
        return plan_epoch(
            placed, batch_size=options.batch_size, grad_accum=options.grad_accum, seed=self.seed, epoch=epoch
        )

    @property
    def epochs_begun(self) -> int:
        """Epochs that the run begins: fewer than `epochs` when `max_steps` ends it earlier."""
        return epochs_begun(self.updates, self.total_updates)

    def bucket_of(self, item: Item) -> Bucket:
        """The size that `item` is cut to."""
        return nearest_bucket(item.width, item.height, self.buckets)

    def caption(self, visit: Visit) -> str:
        """The caption of `visit` as it is trained."""
        return caption_of(visit, self.options, self.seed)

    def captions(self, update: Update) -> tuple[str, ...]:
        """The captions of `update` as they are trained."""
        return tuple(self.caption(visit) for micro_batch in update.micro_batches for visit in micro_batch.visits)

    def fingerprint(self) -> str:
        """A hash of all that the plan of every epoch follows from, wherever the pictures lie now."""
        text = repr([(dataclasses.replace(item, path=""), bucket) for item, bucket in self.placed])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def report(self, cut: Sequence[CutCaption] = ()) -> Report:
        """The data in words; `cut` are captions that the text encoder does not read to their end."""
        return describe_data(
            self.found,
            self.placed,
            self.plan(0),
            self.updates,
            batch_size=self.options.batch_size,
            total=self.total_updates,
            cut=cut,
            duplicates=self.duplicates,
        )


def read_training_set(
    options: DataOptions,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None,
    validation: ValidationFile | None = None,
) -> TrainingSet:
    """The pictures of `data_root`, placed in their buckets, without those that `validation` holds out.

    Raises:
        UserError: there is nothing to train on, or files that cannot be meant as they are.
    """
    with counted("files read") as progress:
        found = find_data(options.data_root, index_kind=options.data_index, progress=progress)
    if options.check_data:
        found = _checked(found, options)
    duplicates = find_duplicates(found.items, found.sizes, memory=Memory(_memory_path(options, "contents")))
    file = NO_VALIDATION if validation is None else validation
    arranged = arrange(file, found.items, lambda root: find_data(root, index_kind=options.data_index).items, duplicates)
    items = [item for item in arranged.training if item.multiply > 0]
    if not items:
        raise UserError(f"data_root = {printable(options.data_root)} leaves no picture to train on")
    buckets = _buckets(options, items)
    placed = tuple((item, nearest_bucket(item.width, item.height, buckets)) for item in items)
    percent = options.rated_dataset_target_dropout_percent if options.rated_dataset else None
    updates = count_updates(
        placed,
        batch_size=options.batch_size,
        grad_accum=options.grad_accum,
        seed=seed,
        epochs=epochs,
        rated_target_percent=percent,
    )
    total = sum(updates) if max_steps is None else min(sum(updates), max_steps)
    return TrainingSet(
        options=options,
        seed=seed,
        epochs=epochs,
        found=found,
        buckets=buckets,
        placed=placed,
        watched=arranged.sets,
        updates=updates,
        total_updates=total,
        validation=validation_updates(updates, file.every_n_epochs, total=total),
        notes=arranged.notes,
        duplicates=duplicates,
    )


def _buckets(options: DataOptions, items: Sequence[Item]) -> tuple[Bucket, ...]:
    if options.buckets == "fitted":
        return fit_buckets(((item.width, item.height) for item in items), options.resolution, options.bucket_step)
    return compute_buckets(options.resolution, options.bucket_step)


def _checked(found: Found, options: DataOptions) -> Found:
    """`found` without the pictures that do not decode."""
    # Another Pillow may read what this one does not.
    memory = Memory(_memory_path(options, f"checked-{version('pillow')}"))
    broken = check_pictures(found.items, workers=max(1, options.num_workers), memory=memory)
    paths = {picture.path for picture in broken}
    items = tuple(item for item in found.items if item.path not in paths)
    return dataclasses.replace(found, items=items, unreadable=(*found.unreadable, *broken))


def _memory_path(options: DataOptions, what: str) -> Path | None:
    """Where `what` is kept between starts: with the index of the first data root."""
    path = index_path(options.data_index, Path(sources(options.data_root)[0].path))
    return None if path is None else path.with_stem(f"{path.stem}-{what}")
