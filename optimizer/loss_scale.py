"""The scale of the loss under fp16, kept on the device: one for all networks, so that they step together or not."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**17.5
BACKOFF = 0.5
GROWTH = 2.0
GROWTH_INTERVAL = 2000
# From each of these updates on: growth factor and the good updates it takes. The scale finds its place quickly at
# first and then creeps, because every step too far costs an update.
TWEAKS = {0: (2.0, 25), 500: (2.0**0.5, 50), 1000: (2.0**0.25, 100), 2000: (2.0**0.125, 200), 4000: (2.0**0.0625, 400)}


class LossScale:
    """A factor on the loss that keeps fp16 gradients from vanishing.

    It halves when gradients overflow and grows after a number of good updates in a row, by torch's own rule
    (`torch.amp.GradScaler`); unlike there, one decision holds for all optimizers, and the host is never asked.
    """

    def __init__(self, device: torch.device | str, *, tweaks: bool = True, initial: float = INITIAL_SCALE) -> None:
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)
        self._tweaks = tweaks

    def update(self, found_inf: Tensor, done: int) -> None:
        """Grow or back off after an update; `found_inf` is a float tensor, 1 where it was skipped.

        Args:
            done: updates before this one.
        """
        growth, interval = self.pace(done)
        torch._amp_update_scale_(self.scale, self._good, found_inf, growth, BACKOFF, interval)

    def pace(self, done: int) -> tuple[float, int]:
        """The growth factor and its interval after `done` updates."""
        if not self._tweaks:
            return GROWTH, GROWTH_INTERVAL
        starts = list(TWEAKS)
        return TWEAKS[starts[bisect.bisect_right(starts, done) - 1]]

    def state_dict(self) -> dict[str, Any]:
        """Scale and progress; live tensors."""
        return {"scale": self.scale, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved scale."""
        self.scale.copy_(state["scale"])
        self._good.copy_(state["good"])
