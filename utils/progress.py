"""How far work before the training has come: a bar on a terminal, now and then a line where nobody watches one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from utils.logs import LOGGER, is_terminal

# Work that takes less than this is not worth a word.
_PATIENCE_SECONDS = 1.0
_LINE_SECONDS = 30.0


@contextmanager
def counted(
    what: str, total: int | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], object]]:
    """A function that is told how many more are done; `what` names the things counted, `total` is all of them.

    Quick work shows nothing at all.
    """
    if not is_terminal(sys.stdout):
        yield _Lines(what, total, clock).add
        return
    from tqdm import tqdm

    bar = None
    with suppress(OSError, ValueError):  # a terminal that is gone: the work goes on without it
        bar = tqdm(total=total, unit=f" {what}", file=sys.stdout, leave=False, delay=_PATIENCE_SECONDS, mininterval=0.2)

    def add(number: int) -> None:
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.update(number)

    try:
        yield add
    finally:
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.close()


class _Lines:
    """A line in the log every half minute."""

    def __init__(self, what: str, total: int | None, clock: Callable[[], float]) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._done, self._next = 0, clock() + _LINE_SECONDS

    def add(self, number: int) -> None:
        self._done += number
        if self._clock() < self._next:
            return
        self._next = self._clock() + _LINE_SECONDS
        of_all = "" if self._total is None else f" of {self._total:,}"
        LOGGER.info("%s%s %s", f"{self._done:,}", of_all, self._what)
