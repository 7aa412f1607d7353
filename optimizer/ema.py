"""A running average of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.config import EmaOptions
from utils.errors import UserError

_CHUNK_BYTES = 256 * 2**20


def ema_is_on(options: EmaOptions) -> bool:
    """Whether a rate or a strength target asks for an average."""
    return options.ema_decay_rate is not None or options.ema_strength_target is not None


def ema_decay(options: EmaOptions, total_updates: int) -> float:
    """The share of the average that stays at each of its updates.

    A strength target S is the share of the first weights that is left at the end: S ^ (1 / EMA updates in the run).

    Raises:
        UserError: the run ends before the average would be updated.
    """
    assert ema_is_on(options)
    count = total_updates // options.ema_update_interval
    if options.ema_strength_target is None:
        assert options.ema_decay_rate is not None
        return options.ema_decay_rate
    if count == 0:
        raise UserError(
            f"ema_strength_target: the run has {total_updates} updates, the average one every "
            f"{options.ema_update_interval}; lower ema_update_interval"
        )
    return float(options.ema_strength_target ** (1 / count))


class Ema:
    """Averages of the trained weights of each part, fp32, on a device of their own.

    Args:
        parts: for each part its trained weights by name, as they start.
        decay: from `ema_decay`.
        interval: updates between two of the average.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, Tensor]],
        *,
        decay: float,
        interval: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.decay, self.interval = decay, interval
        self._averages = {
            part: {
                name: weight.detach().to(device=device, dtype=torch.float32, copy=True)
                for name, weight in weights.items()
            }
            for part, weights in parts.items()
        }

    def update(self, done: int, parts: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Move the averages towards the weights, if it is time; whether it was.

        Args:
            done: updates of the weights so far.
        """
        if done % self.interval:
            return False
        for part, averages in self._averages.items():
            self._move(list(averages.values()), [parts[part][name].detach() for name in averages])
        return True

    def _move(self, averages: list[Tensor], weights: list[Tensor]) -> None:
        """averages += (1 - decay) (weights - averages), in place; other devices and dtypes go through a small copy."""
        here = averages[0]
        if all(weight.device == here.device and weight.dtype == here.dtype for weight in weights):
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
            return
        start, held = 0, 0
        for stop, average in enumerate(averages, start=1):
            held += average.nbytes
            if held >= _CHUNK_BYTES or stop == len(averages):
                copies = [weight.to(here) for weight in weights[start:stop]]
                torch._foreach_lerp_(averages[start:stop], copies, 1 - self.decay)
                start, held = stop, 0

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The average of each trained weight of `part`, by name: the live tensors, to sample and to export."""
        return dict(self._averages[part])

    def load_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Start the average of `part` from a model's weights; names that are not trained are left alone."""
        for name, average in self._averages[part].items():
            average.copy_(tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages, live tensors, by part and name."""
        return {part: dict(averages) for part, averages in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved averages.

        Raises:
            UserError: they belong to other weights.
        """
        for part, averages in self._averages.items():
            if list(state.get(part, {})) != list(averages):
                raise UserError(
                    f"the saved average holds other weights of the {part.replace('_', ' ')} than are trained"
                )
            self.load_tensors(part, state[part])
