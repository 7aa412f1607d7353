"""Twenty updates of both networks against an independent loop of a few lines over Diffusers' own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.build import build_part
from optimizer.noise import Drawer, Draws
from optimizer.objective import Moments, Networks, build_objective, diffusion_step
from optimizer.update import Updater
from starter.networks import TINY, build_networks
from tests.optimizer.parts import alphas_cumprod, asked, settings
from utils.config import LossOptions, NoiseOptions
from utils.optimizer_file import Freezing

LR, SCALE, SIDE = 1e-4, 0.7, 32
BASE = {"lr": LR, "betas": [0.9, 0.999], "epsilon": 1e-6, "weight_decay": 0.01}


def data(update: int) -> tuple[Moments, Tensor]:
    generator = torch.Generator().manual_seed(update)
    mean = torch.randn(2, 4, SIDE // 8, SIDE // 8, generator=generator)
    return Moments(mean, torch.full_like(mean, 0.1)), torch.randint(0, 50, (2, 77), generator=generator)


def draws(drawer: Drawer, update: int) -> Draws:
    return drawer(asked([f"{update}a", f"{update}b"], side=SIDE))


def ours(prediction_type: str, gamma: float | None, drawer: Drawer) -> dict[str, Tensor]:
    real = build_networks(TINY, seed=3)
    networks = Networks(
        lambda noisy, steps, context: real.unet(noisy, steps, context).sample,
        lambda tokens: real.text_encoder(tokens).last_hidden_state,
        lambda pixels: Moments(pixels, pixels),
    )
    loss = LossOptions(min_snr_gamma=gamma)
    objective = build_objective(alphas_cumprod(), prediction_type, loss, drawer.options, latent_scale=SCALE)
    trained = {"unet": real.unet, "text_encoder": real.text_encoder}
    parts = [
        build_part(name, network, settings(BASE), Freezing(), total_updates=20, device_type="cpu")
        for name, network in trained.items()
    ]
    updater = Updater(parts, seed=0)
    for done in range(20):
        moments, tokens = data(done)
        losses = diffusion_step(networks, objective, moments, tokens, draws(drawer, done))
        updater.backward(losses, torch.ones(2), 2, done=done, last=True)
        updater.step(done)
    return {f"{part.name}.{name}": p.detach() for part in parts for name, p in part.parameters.items()}


def theirs(prediction_type: str, gamma: float | None, drawer: Drawer) -> dict[str, Tensor]:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    real = build_networks(TINY, seed=3)
    scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    weights = [*real.unet.parameters(), *real.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, eps=1e-6, fused=True)
    for update in range(20):
        moments, tokens = data(update)
        drawn = draws(drawer, update)
        latents = (moments.mean + moments.std * drawn.latent_noise) * SCALE
        noisy = scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
        answer = real.unet(noisy, drawn.timesteps, real.text_encoder(tokens)[0]).sample
        velocity = scheduler.get_velocity(latents, drawn.noise, drawn.timesteps)
        losses = (answer - (drawn.noise if prediction_type == "epsilon" else velocity)).square().mean((1, 2, 3))
        if gamma is not None:
            snr = compute_snr(scheduler, drawn.timesteps)
            losses = losses * snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [f"unet.{n}" for n, _ in real.unet.named_parameters()]
    names += [f"text_encoder.{n}" for n, _ in real.text_encoder.named_parameters()]
    return dict(zip(names, (weight.detach() for weight in weights), strict=True))


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "offset"),
    [("epsilon", None, 0.0), ("v_prediction", None, 0.1), ("epsilon", 5.0, 0.1), ("v_prediction", 5.0, 0.0)],
)
def test_twenty_updates(prediction_type: str, gamma: float | None, offset: float) -> None:
    options = NoiseOptions(zero_frequency_noise_ratio=offset)
    drawer = Drawer(options, 5, 4, 8, (77, TINY.text_width))
    got, expected = ours(prediction_type, gamma, drawer), theirs(prediction_type, gamma, drawer)
    assert got.keys() == expected.keys()
    far = max((got[name] - expected[name]).abs().max().item() for name in got)
    moved = torch.linalg.vector_norm(got["unet.conv_in.weight"] - build_networks(TINY, seed=3).unet.conv_in.weight)
    assert moved > 0.005
    assert far < 1e-6
