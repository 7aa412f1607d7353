"""Weights that step inside the backward pass, each as soon as its gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from optimizer.build import Part
from optimizer.loss_scale import LossScale
from optimizer.stepping import takes_found_inf
from optimizer.update import StepResult, Updater
from utils.errors import UserError


class UpdaterInBackward(Updater):
    """An updater under which the gradients of a network never exist all at once.

    A bad loss stops the whole update, as ever; a gradient that is not finite stops its own weight alone, because the
    others may have stepped already. Parts are built with `Memory(step_in_backward=True)`.

    Raises:
        UserError: for what needs all gradients at once.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int,
        grad_accum: int = 1,
        clip_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if clip_grad_norm is not None:
            raise UserError("step_in_backward never holds all gradients, so there is no norm to clip_grad_norm by")
        if grad_accum > 1:
            raise UserError(
                f"step_in_backward saves nothing with grad_accum = {grad_accum}, which keeps all gradients; "
                f"use grad_accum = 1"
            )
        if loss_scale is not None:
            raise UserError(
                "step_in_backward does not go with fp16, where an update is taken or left as a whole; use bf16"
            )
        if sum_over_processes is not None:
            raise UserError("step_in_backward trains in one process; start train.py without accelerate launch")
        super().__init__(parts, seed=seed)
        self._closing: int | None = None
        self._squares = {part.name: torch.zeros_like(self._loss) for part in self.parts}
        for part in self.parts:
            assert len(part.optimizers) == len(part.parameters), "built without step_in_backward"
            for place, parameter in enumerate(part.parameters.values()):
                hook = partial(self._take, part, place)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def backward(self, losses: Tensor, image_scales: Tensor, images: int, *, done: int, last: bool) -> None:
        """As of an updater; the pass of the `last` micro-batch changes the weights.

        An update at a bucket's edge has two micro-batches: the first one's gradients wait, all of them, for the second.
        """
        self._closing = done if last else None
        super().backward(losses, image_scales, images, done=done, last=last)
        self._closing = None

    @torch.no_grad()
    def step(self, done: int) -> StepResult:
        """What the update did; there is nothing left to do."""
        norms = {name: square.sqrt() for name, square in self._squares.items()}
        applied = torch.isfinite(torch.stack([self._loss, *norms.values()])).all()
        self._count((~applied).float())
        rates = {part.name: part.lr_at(done) for part in self.parts}
        result = StepResult(self._loss, applied, norms, norms, rates)
        self.discard()
        return result

    def discard(self) -> None:
        """Forget the update in hand; weights that have stepped in it stay as they are."""
        super().discard()
        self._squares = {name: torch.zeros_like(square) for name, square in self._squares.items()}

    @torch.no_grad()
    def _take(self, part: Part, place: int, parameter: nn.Parameter) -> None:
        if self._closing is None:
            return
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._squares[part.name] += norm.square()
        fine = torch.isfinite(self._loss) & torch.isfinite(norm)
        optimizer = part.optimizers[place]
        if takes_found_inf(optimizer) or bool(fine):
            self._step_one(part, place, self._closing, (~fine).float())
        parameter.grad = None
