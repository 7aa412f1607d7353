"""The schedule of an epoch as text: every visit, where it is trained and with which caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.item import Update, Visit
from utils.errors import printable


def schedule_lines(
    updates: Sequence[Update], caption: Callable[[Visit], str], *, first_update: int = 0
) -> Iterator[str]:
    """A line for each visit of an epoch, in the order of training.

    `caption` gives the text as it will be trained; `first_update` is the number of updates before this epoch. Paths are
    relative to their data root and control characters are escaped: the same data gives the same bytes anywhere.
    """
    for number, update in enumerate(updates, first_update):
        for place, micro_batch in enumerate(update.micro_batches):
            width, height = micro_batch.bucket
            for visit in micro_batch.visits:
                yield (
                    f"update:{number:05}, micro:{place}, wh:[{width}, {height}], "
                    f"batch_id:{printable(visit.item.batch_id)}, path:{printable(visit.item.id)}, "
                    f"caption:{printable(caption(visit))}"
                )


def write_schedule(
    folder: Path, epoch: int, updates: Sequence[Update], caption: Callable[[Visit], str], *, first_update: int = 0
) -> Path:
    """Write the schedule of `epoch` to `ep{epoch}_batch_schedule.txt` in `folder`; its path comes back."""
    path = folder / f"ep{epoch}_batch_schedule.txt"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in schedule_lines(updates, caption, first_update=first_update))
    return path
