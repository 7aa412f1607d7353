"""How well the networks do, without training: plain and configured losses of the same prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.diffusion import noisy_latents, target
from optimizer.objective import Networks, Objective, loss_per_image


@torch.no_grad()
def probe_losses(
    networks: Networks,
    objective: Objective,
    latents: Tensor,
    input_ids: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> dict[str, Tensor]:
    """The losses of each image, float32 (B,), by name, on the device of the objective.

    "mse" is the plain squared error, which compares runs of different settings; "configured" is the loss as the
    options shape and weigh it. No perturbation, no offset noise: the question is the same for every run.

    Args:
        latents: unscaled mean of the VAE's distribution, float32 (B, C, h, w).
        timesteps: int64 (B,).
        noise: unit normal, float32 (B, C, h, w).
    """
    scaled = latents * objective.latent_scale
    signal, sigma = objective.signal[timesteps], objective.sigma[timesteps]
    context = networks.encode_text(input_ids)
    prediction = networks.unet(noisy_latents(scaled, noise, signal, sigma), timesteps, context).float()
    wanted = target(objective.prediction_type, scaled, noise, signal, sigma)
    share = timesteps.float() / len(objective.signal)
    configured = loss_per_image(objective.loss_type, prediction, wanted, share) * objective.weights[timesteps]
    return {"mse": loss_per_image("mse", prediction, wanted, share), "configured": configured}
