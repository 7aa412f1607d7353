"""When a checkpoint is due: by the clock and by the epochs."""

from __future__ import annotations

import time
from collections.abc import Callable

from utils.config import SaveOptions

DEFAULT_MINUTES = 20.0


class Timetable:
    """Keeps the time since the last checkpoint.

    With neither minutes nor epochs given, a checkpoint is due every 20 minutes. None is due before the epoch that
    `save_ckpts_from_n_epochs` names, counted from 1.
    """

    def __init__(self, options: SaveOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self._clock = clock
        self._last = clock()

    @property
    def minutes(self) -> float | None:
        """Minutes between checkpoints, `None` when epochs alone decide."""
        if self.options.ckpt_every_n_minutes is None and self.options.save_every_n_epochs is None:
            return DEFAULT_MINUTES
        return self.options.ckpt_every_n_minutes

    def due_after_update(self, epochs_done: int) -> bool:
        """Whether the minutes are up; `epochs_done` are whole epochs before the one in hand."""
        if self.minutes is None or epochs_done + 1 < self.options.save_ckpts_from_n_epochs:
            return False
        return self._clock() - self._last >= 60.0 * self.minutes

    def due_after_epoch(self, epochs_done: int) -> bool:
        """Whether the end of an epoch, the `epochs_done`-th, is a time to save."""
        every = self.options.save_every_n_epochs
        if every is None or epochs_done < self.options.save_ckpts_from_n_epochs:
            return False
        return epochs_done % every == 0

    def saved(self) -> None:
        """A checkpoint was just made: the minutes count from now."""
        self._last = self._clock()
