"""The data in words: what was found, what is left out and why, what the buckets cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.advice import advice
from data.buckets import crop_loss
from data.captions import is_empty
from data.folder import Found
from data.item import Bucket, Item, Update
from data.lengths import CutCaption
from data.plan import Placed, epochs_begun
from utils.errors import printable

SHOWN = 5


@dataclass(slots=True)
class BucketUse:
    """What one bucket holds.

    Args:
        images, visits: in the first epoch.
        lost: sum over the images of the share that is cropped away.
        enlarged: images with fewer pixels than the bucket, one way at least.
        extra: micro-batches that would not be needed if all images were of one size.
    """

    bucket: Bucket
    images: int = 0
    visits: int = 0
    lost: float = 0.0
    enlarged: int = 0
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Lines for the console and the log, and texts for the run folder by file name."""

    lines: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def describe_data(
    found: Found,
    placed: Sequence[Placed],
    first_epoch: Sequence[Update],
    updates: Sequence[int],
    *,
    batch_size: int,
    total: int,
    cut: Sequence[CutCaption] = (),
    duplicates: Sequence[Sequence[Item]] = (),
) -> Report:
    """The data as it will be trained, in words.

    Args:
        placed: the items that are trained on, with their buckets.
        first_epoch: the plan of epoch 0.
        updates: of every epoch of the run, from `count_updates`.
        total: updates of the run, which `max_steps` may end earlier.
    """
    lines: list[str] = [f"data: {_count(len(found.items), 'picture')}, {len(placed):,} to train on"]
    files: dict[str, str] = {}

    def tell(name: str, head: str, entries: Sequence[str]) -> None:
        if not entries:
            return
        files[name] = "".join(f"{entry}\n" for entry in entries)
        lines.append(f"{head} ({name}):")
        lines.extend(f"  {entry}" for entry in entries[:SHOWN])
        if len(entries) > SHOWN:
            lines.append(f"  ... and {len(entries) - SHOWN:,} more")

    items = [item for item, _ in placed]
    unreadable = [str(picture) for picture in found.unreadable]
    undersized = [_undersized(item, bucket) for item, bucket in placed if is_enlarged(item, bucket)]
    empty = [printable(item.path) for item in items if is_empty(item.caption)]
    tell("unreadable_images.txt", f"{_count(len(unreadable), 'picture')} left out", unreadable)
    tell("undersized_images.txt", f"{_count(len(undersized), 'picture')} smaller than the bucket, enlarged", undersized)
    tell("empty_captions.txt", f"{_count(len(empty), 'caption')} empty", empty)
    long = [_cut(caption) for caption in cut]
    tell("cut_captions.txt", f"{_count(len(long), 'caption')} longer than the text encoder reads", long)
    same = [" = ".join(printable(item.path) for item in group) for group in duplicates]
    tell("duplicate_images.txt", f"{_count(len(same), 'picture')} there more than once", same)
    tell("data_warnings.txt", _count(len(found.warnings), "warning"), [str(note) for note in found.warnings])
    uses = bucket_uses(placed, first_epoch, batch_size)
    lines.extend(_bucket_lines(uses))
    lines.extend(f"advice: {sentence}" for sentence in advice(placed, uses, updates))
    lines.extend(_update_lines(uses, updates, batch_size, total))
    return Report(tuple(lines), files)


def write_report(report: Report, folder: Path) -> None:
    """Write the report's files into `folder`, beside `data_report.txt` with all lines."""
    for name, text in {**report.files, "data_report.txt": "".join(f"{line}\n" for line in report.lines)}.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def is_enlarged(item: Item, bucket: Bucket) -> bool:
    """Whether the picture has fewer pixels than its bucket across the side that is not cropped."""
    return min(item.width / bucket.width, item.height / bucket.height) < 1.0


def bucket_uses(placed: Iterable[Placed], first_epoch: Iterable[Update], batch_size: int) -> tuple[BucketUse, ...]:
    """What the buckets in use hold, from the tallest to the widest."""
    uses: dict[Bucket, BucketUse] = {}
    for item, bucket in placed:
        use = uses.setdefault(bucket, BucketUse(bucket))
        use.images += 1
        use.lost += crop_loss(item.width, item.height, bucket)
        use.enlarged += is_enlarged(item, bucket)
    for update in first_epoch:
        parts: dict[Bucket, int] = defaultdict(int)
        for micro_batch in update.micro_batches:
            parts[micro_batch.bucket] += len(micro_batch.visits)
        extra = len(update.micro_batches) - -(-update.images // batch_size)
        # The smallest parts of the update are those that could have ridden along with the others.
        for bucket, visits in sorted(parts.items(), key=lambda part: (part[1], part[0])):
            uses[bucket].visits += visits
            uses[bucket].extra += extra > 0
            extra -= 1
    return tuple(sorted(uses.values(), key=lambda use: use.bucket.width / use.bucket.height))


def _bucket_lines(uses: Sequence[BucketUse]) -> list[str]:
    lines = [f"buckets: {len(uses)} in use:"]
    for use in uses:
        parts = [
            f"{use.bucket.width:>5} x {use.bucket.height:<5}{_count(use.images, 'picture'):>16}",
            f"{100 * use.lost / use.images:5.1f} % cropped",
        ]
        if use.enlarged:
            parts.append(f"{use.enlarged:,} enlarged")
        if use.extra:
            parts.append(_count(use.extra, "extra micro-batch", "extra micro-batches"))
        lines.append(", ".join(parts))
    images = sum(use.images for use in uses)
    if images:
        lines.append(f"crop loss: {100 * sum(use.lost for use in uses) / images:.1f} % of the area on average")
    return lines


def _update_lines(uses: Sequence[BucketUse], updates: Sequence[int], batch_size: int, total: int) -> list[str]:
    visits, extra = sum(use.visits for use in uses), sum(use.extra for use in uses)
    low, high = min(updates, default=0), max(updates, default=0)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    micro = _count(extra, "extra micro-batch", "extra micro-batches")
    return [
        f"epoch: {_count(visits, 'visit')}, {each} updates, micro-batches of up to {batch_size}, {micro}",
        f"run: {_count(epochs_begun(updates, total), 'epoch')}, {total:,} updates",
    ]


def _undersized(item: Item, bucket: Bucket) -> str:
    return f"{printable(item.path)}: {item.width} x {item.height} for {bucket.width} x {bucket.height}"


def _cut(caption: CutCaption) -> str:
    return f"{printable(caption.item.path)}: {caption.tokens} tokens, lost: {printable(caption.lost)}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one}" if number == 1 else f"{number:,} {many if many else one + 's'}"
