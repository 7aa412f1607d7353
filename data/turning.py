"""Whether a validation curve has turned up, told from noise by comparing the same images with themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A rise counts when it is so many standard errors of the paired differences, twice in a row.
SURE = 3.0
TIMES = 2


@dataclass(slots=True)
class Turning:
    """Remembers the best pass of one curve, image by image."""

    best_update: int = 0
    best: list[float] = field(default_factory=list)
    risen: int = 0
    told: bool = False

    def observe(self, update: int, losses: Sequence[float]) -> str | None:
        """A sentence for the user, the first time that the curve has clearly risen above its best.

        `losses`: of each image, in the same order at every pass.
        """
        if len(losses) != len(self.best) or sum(losses) < sum(self.best):
            self.best_update, self.best, self.risen, self.told = update, list(losses), 0, False
            return None
        self.risen = self.risen + 1 if _clearly_above(losses, self.best) else 0
        if self.risen < TIMES or self.told:
            return None
        self.told = True
        low, now = sum(self.best) / len(self.best), sum(losses) / len(losses)
        return (
            f"loss/val has turned up: {now:.5f} after update {update}, {low:.5f} at its lowest after update "
            f"{self.best_update}. The model begins to memorise its images; a checkpoint near update "
            f"{self.best_update} is likely the best. A lower learning rate moves this point further out"
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know: plain JSON values."""
        return {"best_update": self.best_update, "best": self.best, "risen": self.risen, "told": self.told}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.best_update, self.best = int(state["best_update"]), list(state["best"])
        self.risen, self.told = int(state["risen"]), bool(state["told"])


def _clearly_above(losses: Sequence[float], best: Sequence[float]) -> bool:
    rises = [now - then for now, then in zip(losses, best, strict=True)]
    count = len(rises)
    mean = sum(rises) / count
    if count < 2:
        return mean > 0
    spread = math.sqrt(sum((rise - mean) ** 2 for rise in rises) / (count - 1) / count)
    return mean > SURE * spread
