"""What is minimised: from pixels, tokens and draws to a loss per image, as a pure function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss

from optimizer.diffusion import PREDICTION_TYPES, noisy_latents, signal_and_sigma, target
from optimizer.noise import Draws
from optimizer.weights import loss_weights
from utils.config import LossOptions, NoiseOptions

HUBER_DELTA = 1.0


class Moments(NamedTuple):
    """What the VAE's encoder says of a picture: mean and standard deviation of its latents, float32 (B, C, h, w)."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks as functions; each casts to its own precision at its door.

    Args:
        unet: (noisy latents (B, C, h, w), timesteps (B,), context (B, 77, W)) -> prediction (B, C, h, w).
        encode_text: token numbers (B, 77) -> context (B, 77, W), as the sampler would make it (clip skip, final norm).
        encode_image: pixels in [-1, 1], float32 (B, 3, H, W) -> moments.
    """

    unet: Callable[[Tensor, Tensor, Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    encode_image: Callable[[Tensor], Moments]


@dataclass(frozen=True, slots=True)
class Objective:
    """What stays the same for a run, on its device.

    Args:
        signal, sigma: factors of latents and noise, float32 (T,).
        weights: weight of the loss, float32 (T,).
        latent_scale: the VAE's scaling factor.
    """

    signal: Tensor
    sigma: Tensor
    weights: Tensor
    prediction_type: str
    loss_type: str
    latent_scale: float
    embedding_perturbation: float = 0.0
    input_perturbation: float = 0.0


def build_objective(
    alphas_cumprod: Tensor,
    prediction_type: str,
    loss: LossOptions,
    noise: NoiseOptions,
    *,
    latent_scale: float,
    device: torch.device | str = "cpu",
) -> Objective:
    """The objective for a schedule `alphas_cumprod` (T,) as it is trained, after any rescaling.

    Raises:
        UserError: options that contradict each other.
    """
    assert prediction_type in PREDICTION_TYPES, prediction_type
    signal, sigma = signal_and_sigma(alphas_cumprod)
    weights = loss_weights(alphas_cumprod, prediction_type, loss)
    return Objective(
        signal=signal.to(device),
        sigma=sigma.to(device),
        weights=weights.to(device),
        prediction_type=prediction_type,
        loss_type=loss.loss_type,
        latent_scale=latent_scale,
        embedding_perturbation=noise.embedding_perturbation,
        input_perturbation=noise.input_perturbation,
    )


def diffusion_step(
    networks: Networks, objective: Objective, pictures: Tensor | Moments, input_ids: Tensor, draws: Draws
) -> Tensor:
    """The loss of each image, float32 (B,), weighted by timestep; same arguments, same answer.

    Args:
        pictures: pixels, uint8 or float32 in [-1, 1], (B, 3, H, W); or the VAE's moments of them.
        input_ids: int64 (B, 77).
        draws: on the device of the networks, like the rest.
    """
    latents = latents_of(networks, objective, pictures, draws)
    context = perturbed_context(networks.encode_text(input_ids), objective, draws)
    signal, sigma = objective.signal[draws.timesteps], objective.sigma[draws.timesteps]
    noisy = noisy_latents(latents, _input_noise(objective, draws), signal, sigma)
    prediction = networks.unet(noisy, draws.timesteps, context).float()
    wanted = target(objective.prediction_type, latents, draws.noise, signal, sigma)
    share = draws.timesteps.float() / len(objective.signal)
    return loss_per_image(objective.loss_type, prediction, wanted, share) * objective.weights[draws.timesteps]


@torch.no_grad()
def latents_of(networks: Networks, objective: Objective, pictures: Tensor | Moments, draws: Draws) -> Tensor:
    """A sample of the VAE's distribution, scaled to unit variance, float32 (B, C, h, w)."""
    if isinstance(pictures, Tensor):
        moments = networks.encode_image(to_unit_range(pictures))
    else:
        moments = pictures
    latents: Tensor = (moments.mean.float() + moments.std.float() * draws.latent_noise) * objective.latent_scale
    return latents


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], float32: 0 .. 255 is spread over it, floats are as they should be already."""
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels


def perturbed_context(context: Tensor, objective: Objective, draws: Draws) -> Tensor:
    """The text embedding with noise of standard deviation strength / sqrt(width) (arXiv 2405.20494), if asked for."""
    if draws.embedding_noise is None:
        return context
    return context + draws.embedding_noise * (objective.embedding_perturbation / math.sqrt(context.shape[-1]))


def _input_noise(objective: Objective, draws: Draws) -> Tensor:
    """The noise that the UNet sees: with more on it than its target has, if asked for (arXiv 2301.11706)."""
    if draws.input_noise is None:
        return draws.noise
    return draws.noise + objective.input_perturbation * draws.input_noise


def loss_per_image(loss_type: str, prediction: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
    """The mean loss of each image, float32 (B,).

    Args:
        share: timestep over the number of timesteps, (B,). mse_huber is share x mse + (1 - share) x huber, huber_mse
            the other way round; huber is quadratic / 2 up to 1 and linear from there.
    """
    if loss_type == "mse":
        return _image_mean(mse_loss(prediction, wanted, reduction="none"))
    huber = _image_mean(huber_loss(prediction, wanted, reduction="none", delta=HUBER_DELTA))
    if loss_type == "huber":
        return huber
    mse = _image_mean(mse_loss(prediction, wanted, reduction="none"))
    if loss_type == "mse_huber":
        return share * mse + (1 - share) * huber
    assert loss_type == "huber_mse", loss_type
    return share * huber + (1 - share) * mse


def _image_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
