"""The training set of a run: what the data roots hold, each picture with its bucket, and the plan of every epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.batches import caption_of
from data.buckets import compute_buckets, nearest_bucket
from data.folder import Found, find_items
from data.item import Update
from data.plan import Placed, count_updates, plan_epoch
from data.report import Report, describe_data
from utils.config import DataOptions
from utils.errors import Problem, ProblemsError, UserError, printable


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Pictures and how they are trained; everything about it follows from the options and the files.

    Args:
        updates: of each epoch, `max_steps` not yet counted.
        total_updates: of the run.
    """

    options: DataOptions
    seed: int
    found: Found
    placed: tuple[Placed, ...]
    updates: tuple[int, ...]
    total_updates: int

    def plan(self, epoch: int) -> tuple[Update, ...]:
        """The updates of `epoch`, from 0."""
        return plan_epoch(
            self.placed,
            batch_size=self.options.batch_size,
            grad_accum=self.options.grad_accum,
            seed=self.seed,
            epoch=epoch,
        )

    def captions(self, update: Update) -> tuple[str, ...]:
        """The captions of `update` as they are trained."""
        visits = (visit for micro_batch in update.micro_batches for visit in micro_batch.visits)
        return tuple(caption_of(visit, self.options, self.seed) for visit in visits)

    def fingerprint(self) -> str:
        """A hash of all that the plan of every epoch follows from, wherever the pictures lie now."""
        text = repr([(dataclasses.replace(item, path=""), bucket) for item, bucket in self.placed])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def report(self) -> Report:
        """The data in words."""
        return describe_data(self.found, self.placed, self.plan(0), self.updates, batch_size=self.options.batch_size)


def read_training_set(options: DataOptions, *, seed: int, epochs: int, max_steps: int | None) -> TrainingSet:
    """The pictures below `data_root`, placed in their buckets.

    Raises:
        UserError: there is nothing to train on, or files that cannot be meant as they are.
    """
    found = find_items(data_roots(options.data_root))
    buckets = compute_buckets(options.resolution, options.bucket_step)
    placed = tuple(
        (item, nearest_bucket(item.width, item.height, buckets)) for item in found.items if item.multiply > 0
    )
    if not placed:
        why = "; ".join(str(picture) for picture in found.unreadable[:5])
        raise UserError(
            f"data_root = {printable(options.data_root)} holds no picture to train on"
            + (f": {why}" if why else "; put pictures there, each with a caption in a .txt of the same name")
        )
    updates = count_updates(
        placed, batch_size=options.batch_size, grad_accum=options.grad_accum, seed=seed, epochs=epochs
    )
    total = sum(updates) if max_steps is None else min(sum(updates), max_steps)
    return TrainingSet(options, seed, found, placed, updates, total)


def data_roots(value: Any) -> Sequence[Path]:
    """The folders that `data_root` names: one, or a list of them.

    Raises:
        ProblemsError: it is neither, or a folder is missing.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ProblemsError([Problem("options", "data_root", value, "must be a folder or a list of folders")])
    problems = [
        Problem(
            "options",
            "data_root",
            text,
            "no such folder; put pictures there, each with a caption in a .txt of the same name, "
            "or try the embedded starter: python train.py --config starter/train.json",
        )
        for text in texts
        if not Path(text).is_dir()
    ]
    if problems:
        raise ProblemsError(problems)
    return [Path(text) for text in texts]
