"""What is measured between logs: losses that stay on the device until they are asked for, and the pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """Means since the last reading."""

    loss: float
    images: int
    images_per_second: float


class Meter:
    """Sums losses without waiting for the device; reading is what waits."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._loss: Tensor | None = None
        self._images = 0
        self._since = clock()
        self._paused = 0.0

    def add(self, loss_sum: Tensor, images: int) -> None:
        """Count `images` whose losses sum up to `loss_sum` (a scalar on the device)."""
        loss_sum = loss_sum.detach()
        self._loss = loss_sum.clone() if self._loss is None else self._loss.add_(loss_sum)
        self._images += images

    def leave_out(self, seconds: float) -> None:
        """Keep `seconds` of sampling or saving out of the pace."""
        self._paused += seconds

    def read(self) -> Reading:
        """Mean loss per image and images per second since the last reading, data loading included; then start anew."""
        loss = float("nan") if self._loss is None else self._loss.item() / self._images
        now = self._clock()
        seconds = now - self._since - self._paused
        pace = self._images / seconds if seconds > 0 else 0.0
        reading = Reading(loss, self._images, pace)
        self._loss, self._images, self._since, self._paused = None, 0, now, 0.0
        return reading

    def state_dict(self) -> dict[str, Any]:
        """The sum so far; the pace is of this start only."""
        return {"loss": self._loss, "images": self._images}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a saved sum, on `device`."""
        self._loss = None if state["loss"] is None else state["loss"].to(device, copy=True)
        self._images = state["images"]
