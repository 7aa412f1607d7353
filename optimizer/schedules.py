"""Learning rates as functions of the number of updates done."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """The shape of a learning rate over a run.

    Args:
        decay, warmup: updates. The warmup is part of the decay; constant has neither.
        cycles: times that cosine_with_restarts comes down.
        power: of polynomial.
    """

    name: str
    decay: int
    warmup: int
    cycles: int = 3
    power: float = 2.0

    def factor(self, done: int) -> float:
        """The share of the full rate for the update after `done` others, 0 .. 1.

        The formulas are those of Diffusers' `get_scheduler`, except that no rate rises again after the decay.
        """
        if self.name == "constant":
            return 1.0
        if done < self.warmup:
            return done / self.warmup
        if self.name == "constant_with_warmup":
            return 1.0
        progress = min(1.0, (done - self.warmup) / max(1, self.decay - self.warmup))
        if self.name == "linear":
            return 1.0 - progress
        if self.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.name == "polynomial":
            return float((1.0 - progress) ** self.power)
        assert self.name == "cosine_with_restarts", self.name
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (self.cycles * progress % 1.0)))


def build_schedule(
    name: str,
    updates: int,
    *,
    decay: int | None = None,
    warmup: int | None = None,
    cycles: int = 3,
    power: float = 2.0,
) -> Schedule:
    """The schedule for a run of `updates`; what is `None` follows from it.

    Without a number the decay is half as long again as the run, so that the rate never reaches zero, and the warmup
    is 2 % of the decay.
    """
    decay = max(1, math.ceil(1.5 * updates)) if decay is None else decay
    warmup = int(0.02 * decay) if warmup is None else warmup
    return Schedule(name, decay, warmup, cycles, power)
