"""One pass through the networks and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.batches import Batch
from optimizer.objective import diffusion_step
from training.session import Session
from utils.models import tokenize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass leaves for the logs; tensors are on the device.

    Args:
        losses: of each image, (B,), without their graph.
        total: their sum.
    """

    batch: Batch
    losses: Tensor
    total: Tensor


def forward_backward(session: Session, batch: Batch, images: int, *, last: bool) -> Pass:
    """Add the gradients of `batch` to the update of `images` images; `last`: the update is complete with it."""
    device = session.device.torch_device
    input_ids = tokenize(session.models, batch.captions).to(device, non_blocking=True)
    batch = batch.to(device, non_blocking=True)
    losses = diffusion_step(session.networks, session.objective, batch.pixels, input_ids, batch.draws)
    session.updater.backward(losses, batch.loss_scale, images, done=session.progress.update, last=last)
    losses = losses.detach()
    return Pass(batch, losses, losses.sum())
