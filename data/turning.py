"""Whether a validation curve has turned up, told from noise by comparing the same images with themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Means of so many passes are compared: chance in the weights of one pass moves all images together.
WINDOW = 3
# A rise counts when it is so many times what the curve jumps about from pass to pass, known from so many steps, ...
JUMPS, LEAST_STEPS = 5.0, 6
# ... and so many standard errors of the differences, image by image, ...
SURE = 3.0
# ... or fewer of them, if it is this share of the lowest: some images have risen much.
LIKELY, MUCH = 1.5, 0.1


@dataclass(slots=True)
class Turning:
    """Remembers the best pass of one curve, image by image, and the best few passes in a row.

    Args:
        best_update, best: the lowest pass.
        recent: the losses of the last passes, by image.
        lowest: the means of the best `WINDOW` passes in a row, by image.
        steps: how the curve went on since then, from pass to pass.
    """

    best_update: int = 0
    best: float | None = None
    told: bool = False
    recent: list[list[float]] = field(default_factory=list)
    lowest: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def observe(self, update: int, losses: Sequence[float]) -> str | None:
        """A sentence for the user, the first time that the curve has clearly risen above its best.

        `losses`: of each image, in the same order at every pass.
        """
        if self.recent and len(losses) != len(self.recent[0]):
            self.recent, self.lowest, self.steps, self.best = [], [], [], None
        around = self._remember(losses)
        if self.best is None or _mean(losses) < self.best:
            self.best_update, self.best, self.told = update, _mean(losses), False
            return None
        if self.told or not self._has_risen(around):
            return None
        self.told = True
        return (
            f"loss/val has turned up: {_mean(around):.5f} around update {update}, {self.best:.5f} at its "
            f"lowest after update {self.best_update}. The model begins to memorise its images; a checkpoint near "
            f"update {self.best_update} is likely the best. A lower learning rate moves this point further out"
        )

    def _remember(self, losses: Sequence[float]) -> list[float]:
        """The means of the last passes by image, this one included."""
        if self.recent:
            self.steps.append(_mean(losses) - _mean(self.recent[-1]))
        self.recent = [*self.recent, list(losses)][-WINDOW:]
        around = [_mean(values) for values in zip(*self.recent, strict=True)]
        if len(self.recent) == WINDOW and (not self.lowest or _mean(around) < _mean(self.lowest)):
            self.lowest, self.steps = around, []
        return around

    def _has_risen(self, around: Sequence[float]) -> bool:
        if not self.lowest or len(self.steps) < LEAST_STEPS:
            return False
        rise = _mean(around) - _mean(self.lowest)
        jump = math.sqrt(_mean([step * step for step in self.steps]) / 2)
        enough = LIKELY if rise > MUCH * _mean(self.lowest) else SURE
        return rise > JUMPS * jump and _errors_above(around, self.lowest) > enough

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know: plain JSON values."""
        return dataclasses.asdict(self)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; what an older one lacks begins anew."""
        for name, value in dataclasses.asdict(Turning()).items():
            setattr(self, name, state.get(name, value))


def _errors_above(losses: Sequence[float], best: Sequence[float]) -> float:
    """How many standard errors, over the images, the mean rise lies above 0."""
    rises = [now - then for now, then in zip(losses, best, strict=True)]
    mean = _mean(rises)
    if len(rises) < 2:
        return math.inf if mean > 0 else 0.0
    error = math.sqrt(sum((rise - mean) ** 2 for rise in rises) / (len(rises) - 1) / len(rises))
    return mean / error if error > 0 else math.inf * mean if mean else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
