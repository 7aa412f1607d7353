"""The forward process against Diffusers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimizer.diffusion import noisy_latents, signal_and_sigma, signal_to_noise, target, zero_terminal_snr
from tests.optimizer.parts import alphas_cumprod

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(**SD)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_noising_and_velocity_are_the_scheduler_s(name: str) -> None:
    theirs = scheduler(name)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1000, 2, 3, 3, generator=generator)
    noise = torch.randn(1000, 2, 3, 3, generator=generator)
    steps = torch.arange(1000)
    signal, sigma = signal_and_sigma(theirs.alphas_cumprod)
    assert torch.equal(noisy_latents(latents, noise, signal, sigma), theirs.add_noise(latents, noise, steps))
    if hasattr(theirs, "get_velocity"):
        v = target("v_prediction", latents, noise, signal, sigma)
        assert torch.equal(v, theirs.get_velocity(latents, noise, steps))
    assert target("epsilon", latents, noise, signal, sigma) is noise
    assert target("sample", latents, noise, signal, sigma) is latents


def test_signal_to_noise_is_diffusers_compute_snr() -> None:
    from diffusers.training_utils import compute_snr

    theirs = compute_snr(scheduler("DDPMScheduler"), torch.arange(1000))
    assert torch.allclose(signal_to_noise(alphas_cumprod()), theirs, rtol=1e-4)


def test_zero_terminal_snr_is_diffusers_rescaling() -> None:
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = zero_terminal_snr(torch.cumprod(1 - betas, 0))
    assert ours[-1] == 0
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ours[0], alphas_cumprod()[0])
    assert torch.allclose(ours, alphas_cumprod(zero_snr=True), atol=1e-5)
