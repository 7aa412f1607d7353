"""Advice on a data set, in plain words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from data.buckets import MAX_RATIO, crop_loss
from data.item import Bucket
from data.plan import Placed

_NAMED = {"1:1": 1.0, "5:4": 1.25, "4:3": 4 / 3, "3:2": 1.5, "16:10": 1.6, "16:9": 16 / 9, "2:1": 2.0, "21:9": 21 / 9}
_NAMED |= {"3:1": 3.0, "4:1": 4.0}
_MUCH = 0.10


class Use(Protocol):
    """What advice needs to know of a bucket."""

    bucket: Bucket
    enlarged: int


def advice(placed: Sequence[Placed], uses: Sequence[Use], updates: Sequence[int]) -> list[str]:
    """Sentences on what would make more of this data; none when nothing stands out."""
    return [*_extreme(placed), *_cropped(placed), *_enlarged(placed, uses), *_few(placed, updates)]


def shape_name(width: float, height: float) -> str:
    """The usual name of the nearest aspect ratio, the longer side first."""
    ratio = max(width, height) / min(width, height)
    return min(_NAMED, key=lambda name: max(ratio / _NAMED[name], _NAMED[name] / ratio))


def _extreme(placed: Sequence[Placed]) -> list[str]:
    beyond = [item for item, _ in placed if not _within(item.width / item.height)]
    if not beyond:
        return []
    if len(beyond) == 1:
        return [f"1 picture is longer than {MAX_RATIO:g}:1 and loses its ends; cut it into several pictures yourself"]
    return [
        f"{len(beyond):,} pictures are longer than {MAX_RATIO:g}:1 and lose their ends; "
        "cut them into several pictures yourself"
    ]


def _within(ratio: float) -> bool:
    return 1 / (MAX_RATIO * 1.1) <= ratio <= MAX_RATIO * 1.1


def _cropped(placed: Sequence[Placed]) -> list[str]:
    """Shapes that lose much in their bucket; longer ones than any bucket are another matter."""
    losses: dict[tuple[str, Bucket], list[float]] = defaultdict(list)
    for item, bucket in placed:
        if _within(item.width / item.height):
            losses[shape_name(item.width, item.height), bucket].append(crop_loss(item.width, item.height, bucket))
    return [
        f"{'1 picture' if len(lost) == 1 else f'{len(lost):,} pictures'} of about {shape} "
        f"{'loses' if len(lost) == 1 else 'lose'} {100 * sum(lost) / len(lost):.0f} % "
        f"in {bucket.width} x {bucket.height}; "
        "a smaller bucket_step or fitted buckets keep more of them"
        for (shape, bucket), lost in sorted(losses.items())
        if sum(lost) > _MUCH * len(lost)
    ]


def _enlarged(placed: Sequence[Placed], uses: Sequence[Use]) -> list[str]:
    enlarged = sum(use.enlarged for use in uses)
    if enlarged <= _MUCH * len(placed):
        return []
    share = 100 * enlarged / len(placed)
    return [f"{share:.0f} % of the pictures are enlarged, which teaches blur; use larger files or a lower resolution"]


def _few(placed: Sequence[Placed], updates: Sequence[int]) -> list[str]:
    if not placed or not updates or max(updates) > 1:
        return []
    return ["an epoch is a single update; a smaller batch_size or grad_accum gives the optimizer more steps"]
