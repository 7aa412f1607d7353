"""Which pictures kill or stall the worker that reads them: a decoder that crashes leaves no exception behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from data.batches import BatchSource
from data.headers import PictureError
from data.item import Visit
from data.substitutes import substitutes
from utils.stopping import StopSignal, begin_worker, workers_start

SECONDS = 60.0
_GLANCE_SECONDS = 0.1


def find_culprits(
    source: BatchSource,
    visits: Sequence[Visit],
    *,
    start: str | None = None,
    seconds: float = SECONDS,
    stop: StopSignal | None = None,
) -> dict[str, str]:
    """Read the pictures of `visits` in a process apart; the reason by id for those that end or stall it.

    First comes another picture: where that fails too, the machine is to blame (no memory, a disk that is gone) and
    nothing is returned, nor once a stop is asked for.

    Args:
        start: how processes are started; `None` is the way of this platform.
        seconds: that a picture may take.
    """
    suspects = list({visit.item.id: visit for visit in visits}.values())
    others = _not_suspected(source, suspects)
    visits = [*others, *suspects]
    found: dict[str, str] = {}
    place = 0
    while place < len(visits) and not stop:
        place, reason = _read_apart(source, visits, place, start, seconds, stop)
        if reason is not None:
            if place < len(others):
                return {}
            found[visits[place].item.id] = reason
            place += 1
    return {} if stop else found


def _not_suspected(source: BatchSource, suspects: Sequence[Visit]) -> list[Visit]:
    """One visit of another picture, or none where all are suspected."""
    named = {visit.item.id for visit in suspects}
    for visit in suspects:
        for other in substitutes(visit, source.pools.get(visit.bucket, ()), seed=source.seed):
            if other.item.id not in named:
                return [other]
    return []


def _read_apart(
    source: BatchSource,
    visits: Sequence[Visit],
    first: int,
    start: str | None,
    seconds: float,
    stop: StopSignal | None,
) -> tuple[int, str | None]:
    """Where a process that reads `visits` from `first` on came to its end, and why it was before theirs."""
    context: Any = multiprocessing.get_context(start)
    place = context.Value("q", first, lock=False)
    process = context.Process(target=_read, args=(os.getpid(), source, visits, place), daemon=True)
    with workers_start(start):
        process.start()
    seen, since = first, time.monotonic()
    while process.is_alive() and time.monotonic() - since < seconds and not stop:
        process.join(_GLANCE_SECONDS)
        if place.value != seen:
            seen, since = place.value, time.monotonic()
    if process.is_alive():
        process.kill()
        process.join()
        return place.value, None if stop else f"reading it took more than {seconds:.0f} seconds"
    if place.value == len(visits):
        return place.value, None
    return place.value, f"reading it ends the process that does (exit code {process.exitcode})"


def _read(parent: int, source: BatchSource, visits: Sequence[Visit], place: Any) -> None:
    begin_worker(parent)
    while place.value < len(visits):
        # That is what a worker can tell by itself.
        with suppress(PictureError):
            source.pixels(visits[place.value])
        place.value += 1
