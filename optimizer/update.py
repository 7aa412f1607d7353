"""The only place that changes a weight: backward passes, gradient norms, clipping and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from optimizer.build import Part
from optimizer.loss_scale import LossScale
from optimizer.moments import load_part_state, part_state
from optimizer.stepping import step_optimizer, takes_found_inf
from utils.errors import UserError
from utils.optimizer_names import FINDS_ITS_RATE
from utils.seeding import stream_seed

STATE_VERSION = 1
_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an update did; tensors stay on the device until somebody logs them.

    Args:
        loss: mean over the images of the update, weighted as trained.
        applied: bool, False where loss or gradients were not finite and no weight was changed.
        grad_norms: of each part, before clipping.
        clipped_norms: and after.
        rates: the learning rate of each part.
    """

    loss: Tensor
    applied: Tensor
    grad_norms: Mapping[str, Tensor]
    clipped_norms: Mapping[str, Tensor]
    rates: Mapping[str, float]


class Updater:
    """Changes the weights of its parts, all of them or none.

    A loss or a gradient that is not finite never reaches a weight or a moment. Optimizers that can be told on the
    device (torch's fused ones, adacoor) cost no synchronisation; with any other one the host reads one flag an update.

    Args:
        seed: of the run, for stochastic rounding.
        loss_scale: under fp16.
        sum_over_processes: where several processes share an update: the sum of a tensor over them.

    Raises:
        UserError: bf16 weights together with fp16 gradients.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int,
        clip_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        assert parts, "nothing to train"
        if loss_scale is not None and any(part.memory.bf16_weights for part in parts):
            raise UserError("weight_dtype = bf16 computes in bf16; leave amp_dtype at auto or set it to bf16")
        self.parts = tuple(parts)
        self.clip_grad_norm = clip_grad_norm
        self.loss_scale = loss_scale
        self._seed, self._sum = seed, sum_over_processes
        device = next(iter(self.parts[0].parameters.values())).device
        self._loss = torch.zeros((), device=device)
        self._skipped = torch.zeros(2, dtype=torch.int64, device=device)
        self._asks_host = not all(takes_found_inf(part.optimizers[0]) for part in self.parts)

    def backward(self, losses: Tensor, image_scales: Tensor, images: int, *, done: int, last: bool) -> None:
        """Add a micro-batch to the update in hand.

        Args:
            losses: of each image, (B,), with their graph.
            image_scales: `loss_scale` of each image, (B,).
            images: of the whole update: its loss is the mean over them, however it is cut.
            done, last: updates before this one, and whether this is its last micro-batch; looked at by an updater
                that steps inside the backward pass.
        """
        loss = (losses * image_scales).sum() / images
        self._loss += loss.detach()
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()  # type: ignore[no-untyped-call]

    def discard(self) -> None:
        """Forget the update in hand, which ran out of memory, say, half way."""
        self._loss = torch.zeros_like(self._loss)
        self._drop_gradients()

    @torch.no_grad()
    def step(self, done: int) -> StepResult:
        """Change the weights by the gradients in hand, and drop these.

        Args:
            done: updates before this one; learning rates are functions of it.
        """
        inverse = None if self.loss_scale is None else 1 / self.loss_scale.scale
        loss = self._loss if self._sum is None else self._sum(self._loss)
        norms = {part.name: _norm(part, inverse) for part in self.parts}
        applied = torch.isfinite(torch.stack([loss, *norms.values()])).all()
        found_inf = (~applied).float()
        clipped = {part.name: self._scale_gradients(part, norms[part.name], inverse) for part in self.parts}
        rates = {part.name: part.lr_at(done) for part in self.parts}
        if not self._asks_host or bool(applied):
            for part in self.parts:
                self._step_part(part, done, found_inf)
        self._drop_gradients()
        self._count(found_inf)
        if self.loss_scale is not None:
            self.loss_scale.update(found_inf, done)
        self._loss = torch.zeros_like(self._loss)
        return StepResult(loss, applied, norms, clipped, rates)

    def skipped(self) -> tuple[int, int]:
        """Updates that were skipped: in all, and in a row up to now. Waits for the device: for use when logging."""
        total, in_row = self._skipped.tolist()
        return total, in_row

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides the weights; tensors are the live ones."""
        return {
            "version": STATE_VERSION,
            "parts": {part.name: part_state(part) for part in self.parts},
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from saved moments, with the options of today; returns a line for each option that is another now.

        Raises:
            UserError: the state belongs to other optimizers or other weights.
        """
        if state["version"] != STATE_VERSION:
            raise UserError("the saved state was written by another version of Emulsion; use --resume_mode weights")
        saved = state["parts"]
        names = [part.name for part in self.parts]
        if sorted(saved) != sorted(names):
            raise UserError(
                f"the saved state trains {' and '.join(sorted(saved))}, this run {' and '.join(sorted(names))}; "
                f"set disable_unet_training and disable_textenc_training as they were, or use --resume_mode weights"
            )
        changes = [line for part in self.parts for line in load_part_state(part, saved[part.name])]
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._skipped.copy_(state["skipped"])
        return changes

    def _step_part(self, part: Part, done: int, found_inf: Tensor) -> None:
        for place in range(len(part.optimizers)):
            self._step_one(part, place, done, found_inf)

    def _step_one(self, part: Part, place: int, done: int, found_inf: Tensor) -> None:
        rate = part.lr_at(done)
        if rate == 0 and part.optimizer_name in FINDS_ITS_RATE:
            return  # they divide by it
        step_optimizer(part.optimizers[place], rate, found_inf, self._rounding(part, done, place))

    def _rounding(self, part: Part, done: int, place: int) -> Generator | None:
        if not part.memory.bf16_weights:
            return None
        seed = stream_seed(self._seed, "rounding", done, part.name, place)
        return Generator(self._loss.device).manual_seed(seed)

    def _scale_gradients(self, part: Part, norm: Tensor, inverse: Tensor | None) -> Tensor:
        """Undo the loss scale and clip, in one pass over the gradients; the norm afterwards."""
        factor, after = inverse, norm
        if self.clip_grad_norm is not None:
            clip = (self.clip_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
            factor, after = clip if inverse is None else inverse * clip, norm * clip
        if factor is not None:
            torch._foreach_mul_(list(_gradients(part)), factor)
        return after

    def _count(self, found_inf: Tensor) -> None:
        bad = found_inf.long()
        self._skipped[0] += bad
        self._skipped[1] = (self._skipped[1] + bad) * bad

    def _drop_gradients(self) -> None:
        for part in self.parts:
            for parameter in part.parameters.values():
                parameter.grad = None


def _gradients(part: Part) -> Iterator[Tensor]:
    return (parameter.grad for parameter in part.parameters.values() if parameter.grad is not None)


def _norm(part: Part, inverse: Tensor | None) -> Tensor:
    """The norm of all gradients of `part` as one vector, without the loss scale."""
    gradients = list(_gradients(part))
    assert gradients, f"no gradient has reached the {part.name}"
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)))
    return norm if inverse is None else norm * inverse
