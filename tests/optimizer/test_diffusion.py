"""The forward process against Diffusers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimizer.diffusion import noisy_latents, signal_and_sigma, signal_to_noise, target
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
