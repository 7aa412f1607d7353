"""The forward process of diffusion as formulas over alphas_cumprod: noising, targets, signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """The signal-to-noise ratio of each timestep, (T,): alphas_cumprod / (1 - alphas_cumprod)."""
    return alphas_cumprod / (1 - alphas_cumprod)


def noisy_latents(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """`signal` x `latents` + `sigma` x `noise`, (B, C, h, w); `signal` and `sigma` are (B,)."""
    return _rows(signal, latents) * latents + _rows(sigma, noise) * noise


def target(prediction_type: str, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """What the UNet should answer, (B, C, h, w): the noise, the latents, or v (arXiv 2202.00512, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    assert prediction_type == "v_prediction", prediction_type
    return _rows(signal, noise) * noise - _rows(sigma, latents) * latents


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def signal_and_sigma(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the latents and of the noise at each timestep, float32 (T,)."""
    return alphas_cumprod.sqrt().to(torch.float32), (1 - alphas_cumprod).sqrt().to(torch.float32)
