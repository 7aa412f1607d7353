"""The networks as functions: each computes in the precision of the device and answers in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from utils.device import Device
from utils.models import encode_text

if TYPE_CHECKING:
    from torch import Tensor


def predict_noise(unet: Any, device: Device, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """What the UNet predicts, (B, C, h, w): the noise or the velocity, as it was trained."""
    with device.autocast():
        return unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]  # type: ignore[no-any-return]


def embed_text(text_encoder: Any, device: Device, clip_skip: int, trained: bool, input_ids: Tensor) -> Tensor:
    """The context (B, 77, W) of token numbers (B, 77); without a graph when the text encoder is not trained."""
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()), device.autocast():
        return encode_text(text_encoder, input_ids, clip_skip).float()


@torch.no_grad()
def encode_image(vae: Any, device: Device, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, fp32 (B, C, H/8, W/8) each, of pixels in [-1, 1] (B, 3, H, W)."""
    with device.autocast():
        distribution = vae.encode(pixels).latent_dist
    return distribution.mean.float(), distribution.std.float()
