"""What is tried before the first update, so that memory, a disk or a folder does not fail an hour into the run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.batches import Batch
from data.item import Bucket, MicroBatch, Update, Visit
from optimizer.in_backward import UpdaterInBackward
from training.memory import learn_from_shortage, pieces
from training.session import Session
from training.step import forward_backward
from utils.files import partial_path, sync_file
from utils.logs import LOGGER
from utils.saving import SPARE_BYTES
from utils.tree import snapshot, tree_bytes
from utils.writer import SPARE_MEMORY_BYTES, available_bytes

GIB = 2**30


def rehearse(session: Session) -> None:
    """Try the largest micro-batch of every bucket, one sample and the copy for a save, and report what they take.

    Gradients are dropped and nothing is drawn from global state: the run does not notice.

    Raises:
        OutOfMemoryError: not even one image fits.
    """
    with _moments_to_come(session):
        # step_in_backward has no pass without a step.
        if not isinstance(session.updater, UpdaterInBackward):
            _rehearse_updates(session)
        _rehearse_sample(session)
    _rehearse_copy(session)


@contextmanager
def _moments_to_come(session: Session) -> Iterator[None]:
    """Hold the memory that the optimizers will hold from their first step on."""
    held = torch.empty(_coming_bytes(session), dtype=torch.uint8, device=session.device.torch_device)
    yield
    del held


def _rehearse_updates(session: Session) -> None:
    told = []
    updates = [Update((_largest_micro_batch(session, bucket),)) for bucket in _buckets(session)]
    for update, batch in zip(updates, session.batches.epoch(updates), strict=True):
        session.device.begin_peak()
        _rehearse_update(session, update, batch)
        peak = session.device.peak_gib()
        if peak is not None:
            bucket = update.micro_batches[0].bucket
            rows = min(update.images, session.row_limits.get(bucket, update.images))
            told.append(f"{rows} images of {bucket.width} x {bucket.height}: {peak:.2f} GiB")
    if told:
        LOGGER.info("memory at the peak of an update: %s", "; ".join(told))


def _buckets(session: Session) -> list[Bucket]:
    """The buckets in use, largest first: that one decides, and what it leaves behind serves the others."""
    found = {bucket for _, bucket in session.data.placed}
    return sorted(found, key=lambda bucket: (bucket.width * bucket.height, bucket.width), reverse=True)


def _largest_micro_batch(session: Session, bucket: Bucket) -> MicroBatch:
    """As many visits as a micro-batch may have; with fewer images in the bucket, some come again."""
    items = [item for item, where in session.data.placed if where == bucket]
    count = session.options.data.batch_size
    return MicroBatch(bucket, tuple(Visit(items[n % len(items)], bucket, 0, n // len(items)) for n in range(count)))


def _rehearse_update(session: Session, update: Update, batch: Batch) -> None:
    while True:
        try:
            for piece, last in pieces(session, batch):
                forward_backward(session, piece, update.images, last=last)
        except RuntimeError as error:
            if not session.device.out_of_memory(error):
                raise
            learn_from_shortage(session, batch)
        else:
            return
        finally:
            session.updater.discard()


def _rehearse_sample(session: Session) -> None:
    session.device.begin_peak()
    captions = session.data.captions(session.data.plan(0)[0])
    try:
        drawn = session.gallery.rehearse(session.progress.update, captions)
    except Exception as error:  # noqa: BLE001  a sample that fails never ends a run
        session.device.out_of_memory(error)
        LOGGER.warning("samples will fail, the training goes on without them: %s", str(error).split("\n")[0])
        return
    peak = session.device.peak_gib()
    if drawn is not None and peak is not None:
        LOGGER.info("memory at the peak of a sample of %d x %d: %.2f GiB", drawn.width, drawn.height, peak)


def _rehearse_copy(session: Session) -> None:
    """Take the copy from which a save is written: only so it shows that the machine's memory holds it."""
    state = session.state()
    if tree_bytes(state) + SPARE_MEMORY_BYTES > available_bytes():
        LOGGER.warning("memory does not hold a copy of the training state: training waits for the whole of each save")
        return
    started = time.perf_counter()
    snapshot(state)
    seconds = time.perf_counter() - started
    LOGGER.info("a save copies %.2f GiB, for which the training waits %.1f s", tree_bytes(state) / GIB, seconds)


def foresee_saves(session: Session) -> None:
    """Warn when a checkpoint cannot be written where it is to go, while there is time to mend it."""
    exports = _export_bytes(session)
    needed = {session.run.ckpts: tree_bytes(session.state()) + _coming_bytes(session) + exports}
    if not session.options.save.no_save_ckpt:
        needed[_single_files(session)] = exports
    for folder, size in needed.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _try_to_write(folder, session.run.name)
            together = sum(other for path, other in needed.items() if _same_disk(path, folder))
            free = shutil.disk_usage(folder).free
        except OSError as error:
            LOGGER.warning("%s cannot be written, so saves will fail there: %s", folder, str(error))
            continue
        if free < together + SPARE_BYTES:
            LOGGER.warning(
                "%s has %.2f GiB free and a save takes %.2f GiB; make room, or saves will fail",
                *(folder, free / GIB, max(size, together) / GIB),
            )


def _coming_bytes(session: Session) -> int:
    return sum(part.coming_bytes() for part in session.parts.values())


def _export_bytes(session: Session) -> int:
    """One set of exports, and a second one for the average."""
    models = session.models
    networks = (models.unet, models.text_encoder, models.vae)
    numbers = sum(p.numel() for network in networks for p in network.parameters())
    return int(numbers * session.archive.dtype.itemsize * (1 if session.ema is None else 2))


def _single_files(session: Session) -> Path:
    folder = session.options.save.save_ckpt_dir
    return Path() if folder is None else Path(folder)


def _try_to_write(folder: Path, owner: str) -> None:
    probe = partial_path(folder / "probe", owner)
    try:
        probe.write_bytes(b"probe")
        sync_file(probe)
    finally:
        probe.unlink(missing_ok=True)


def _same_disk(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and one.stat().st_dev == other.stat().st_dev)
