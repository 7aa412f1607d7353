"""What is trained in place of a picture that turns out to be broken in the middle of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data.item import Bucket, Item, Visit
from data.plan import Placed
from utils.errors import UserError, printable
from utils.seeding import stream

MAX_SHARE = 0.01
_TRIES = 8
# Substitutes count their repeats from here: their draws are never those of the item's own visits.
_FIRST_REPEAT = 1_000_000


def pools(placed: Sequence[Placed]) -> dict[Bucket, tuple[Item, ...]]:
    """The items of each bucket, by id: what substitutes are taken from."""
    found: dict[Bucket, list[Item]] = defaultdict(list)
    for item, bucket in placed:
        found[bucket].append(item)
    return {bucket: tuple(sorted(items, key=lambda item: item.id)) for bucket, items in found.items()}


def substitutes(visit: Visit, pool: Sequence[Item], *, seed: int) -> Iterator[Visit]:
    """The visits to try, one after another, when the picture of `visit` cannot be decoded.

    They are of other items of the same bucket and follow from the seed and the visit alone, so that every worker, and a
    run that is resumed, takes the same. At most eight; none when the bucket holds nothing else.
    """
    chance = stream(seed, "substitute", visit.epoch, visit.item.id, visit.repeat)
    others = [item for item in pool if item.id != visit.item.id]
    for place, item in enumerate(chance.sample(others, min(_TRIES, len(others)))):
        yield replace(visit, item=item, repeat=_FIRST_REPEAT + visit.repeat * _TRIES + place)


class Failures:
    """The pictures that could not be decoded while training, epoch by epoch."""

    def __init__(self) -> None:
        self._epoch = -1
        self._reasons: dict[str, str] = {}

    def add(self, visit: Visit, reason: str, visits: int) -> str | None:
        """Take note of a failure in an epoch of so many `visits`; a line for the log comes back, once for a picture.

        Raises:
            UserError: more than one percent of the epoch's visits have failed, with the list.
        """
        if visit.epoch != self._epoch:
            self._epoch, self._reasons = visit.epoch, {}
        known = visit.item.path in self._reasons
        self._reasons[visit.item.path] = reason
        if len(self._reasons) > max(1.0, MAX_SHARE * visits):
            lines = "".join(f"\n  {printable(path)}: {printable(why)}" for path, why in self._reasons.items())
            raise UserError(
                f"{len(self._reasons):,} pictures of epoch {visit.epoch} with its {visits:,} visits cannot be decoded, "
                f"more than one percent. Mend or remove them (--check_data finds all of them at once):{lines}"
            )
        if known:
            return None
        return f"{printable(visit.item.path)}: {printable(reason)}; another picture of its size is trained in its place"
