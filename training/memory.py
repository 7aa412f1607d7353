"""When memory is short: how a micro-batch is cut when it does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from data.batches import Batch
from data.item import Bucket
from optimizer.in_backward import UpdaterInBackward
from training.session import Session
from utils.errors import OutOfMemoryError
from utils.logs import LOGGER

REMEDIES = (
    "gradient_checkpointing, a smaller resolution, adamw8bit in the optimizer file, ema_device cpu, "
    "weight_dtype bf16 or step_in_backward"
)


def bucket_of(batch: Batch) -> Bucket:
    """The size of the pictures of `batch`."""
    return Bucket(batch.pixels.shape[-1], batch.pixels.shape[-2])


def pieces(session: Session, batch: Batch) -> Iterator[tuple[Batch, bool]]:
    """`batch` in as many equal parts as its bucket has been found to need, each with whether it is the last."""
    count = len(batch.visits)
    limit = session.row_limits.get(bucket_of(batch), count)
    parts = -(-count // limit)
    for part in range(parts):
        start, stop = part * count // parts, (part + 1) * count // parts
        yield (batch if parts == 1 else batch.rows(start, stop)), part + 1 == parts


def learn_from_shortage(session: Session, batch: Batch) -> None:
    """Halve the images of this bucket that go through together, and say so once.

    Raises:
        OutOfMemoryError: one image does not fit, or weights have stepped already.
    """
    bucket = bucket_of(batch)
    limit = min(session.row_limits.get(bucket, len(batch.visits)), len(batch.visits))
    if limit == 1:
        raise OutOfMemoryError(
            f"one image of {bucket.width} x {bucket.height} does not fit into memory; what may help: {REMEDIES}"
        )
    if isinstance(session.updater, UpdaterInBackward):
        raise OutOfMemoryError(
            f"{limit} images of {bucket.width} x {bucket.height} do not fit into memory, and with step_in_backward "
            f"an update cannot be made anew; use a smaller batch_size, or {REMEDIES}"
        )
    session.row_limits[bucket] = (limit + 1) // 2
    LOGGER.warning(
        "%d images of %d x %d do not fit into memory; they go through %d at a time from now on, with the same result",
        limit,
        bucket.width,
        bucket.height,
        session.row_limits[bucket],
    )
