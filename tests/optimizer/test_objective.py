"""The step as a pure function: against an independent loop over Diffusers' scheduler, and option by option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.noise import Drawer, Draws
from optimizer.objective import Moments, Networks, Objective, build_objective, diffusion_step, loss_per_image
from starter.networks import TINY, build_networks
from tests.optimizer.parts import alphas_cumprod, asked
from utils.config import LossOptions, NoiseOptions

SCALE = 0.7
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def real() -> Any:
    return build_networks(TINY, seed=3)


@pytest.fixture(scope="module")
def networks(real: Any) -> Networks:
    def encode_image(pixels: Tensor) -> Moments:
        posterior = real.vae.encode(pixels).latent_dist
        return Moments(posterior.mean, posterior.std)

    return Networks(
        unet=lambda noisy, steps, context: real.unet(noisy, steps, context).sample,
        encode_text=lambda tokens: real.text_encoder(tokens).last_hidden_state,
        encode_image=encode_image,
    )


def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 77), generator=torch.Generator().manual_seed(2))


def draws(**options: Any) -> Draws:
    """Draws at timesteps of every kind: hardly any noise, some, hardly any picture."""
    drawn = Drawer(NoiseOptions(**options), 5, 4, 8, (77, TINY.text_width))(asked(NAMES))
    return dataclasses.replace(drawn, timesteps=torch.tensor([20, 300, 900]))


def objective(prediction_type: str = "epsilon", noise: dict[str, Any] | None = None, **loss: Any) -> Objective:
    options = NoiseOptions(**({} if noise is None else noise))
    return build_objective(alphas_cumprod(), prediction_type, LossOptions(**loss), options, latent_scale=SCALE)


def value(networks: Networks, goal: Objective, drawn: Draws | None = None) -> Tensor:
    with torch.no_grad():
        return diffusion_step(networks, goal, pictures(), tokens(), draws() if drawn is None else drawn)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_step_is_the_textbook_loop(networks: Networks, real: Any, prediction_type: str, gamma: float | None) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    drawn = draws(zero_frequency_noise_ratio=0.1)
    got = value(networks, objective(prediction_type, min_snr_gamma=gamma), drawn)

    scheduler: Any = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )
    with torch.no_grad():
        posterior = real.vae.encode(pictures().float() / 127.5 - 1).latent_dist
        latents = (posterior.mean + posterior.std * drawn.latent_noise) * SCALE
        noisy = scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
        answer = real.unet(noisy, drawn.timesteps, real.text_encoder(tokens())[0]).sample
        wanted = (
            drawn.noise
            if prediction_type == "epsilon"
            else scheduler.get_velocity(latents, drawn.noise, drawn.timesteps)
        )
        expected = (answer - wanted).square().mean((1, 2, 3))
        if gamma is not None:
            snr = compute_snr(scheduler, drawn.timesteps)
            divisor = snr if prediction_type == "epsilon" else snr + 1
            expected = expected * snr.clamp(max=gamma) / divisor
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_same_arguments_same_answer_and_each_image_by_itself(networks: Networks) -> None:
    goal, drawn = objective(), draws()
    whole = value(networks, goal, drawn)
    assert torch.equal(whole, value(networks, goal, drawn))
    with torch.no_grad():
        rows = [
            diffusion_step(networks, goal, pictures()[i : i + 1], tokens()[i : i + 1], drawn.rows(i, i + 1))
            for i in range(3)
        ]
    assert torch.allclose(torch.cat(rows), whole, rtol=1e-5)
    assert whole.shape == (3,)
    assert whole.dtype == torch.float32


def test_moments_stand_in_for_pixels(networks: Networks) -> None:
    with torch.no_grad():
        moments = networks.encode_image(pictures().float() / 127.5 - 1)
        cached = diffusion_step(networks, objective(), moments, tokens(), draws())
    assert torch.equal(cached, value(networks, objective()))


def test_the_vae_gets_no_gradient_and_the_others_do(networks: Networks, real: Any) -> None:
    diffusion_step(networks, objective(), pictures(), tokens(), draws()).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in real.vae.parameters())
    for network in (real.unet, real.text_encoder):
        assert any(parameter.grad is not None for parameter in network.parameters())
        network.zero_grad()


@pytest.mark.parametrize(
    "changed",
    [
        {"min_snr_gamma": 5.0},
        {"loss_type": "huber"},
        {"loss_type": "mse_huber"},
        {"loss_type": "huber_mse"},
        {"loss_weighting": "soft_min_snr"},
        {"loss_weighting": "debiased"},
    ],
)
def test_every_loss_option_has_an_effect(networks: Networks, changed: dict[str, Any]) -> None:
    assert not torch.allclose(value(networks, objective(**changed)), value(networks, objective()), rtol=1e-4)


def record(networks: Networks, goal: Objective, drawn: Draws) -> dict[str, Tensor]:
    """What reaches the UNet's door."""
    seen: dict[str, Tensor] = {}

    def unet(noisy: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        seen.update(noisy=noisy, context=context)
        return networks.unet(noisy, steps, context)

    value(dataclasses.replace(networks, unet=unet), goal, drawn)
    return seen


def test_embedding_perturbation_has_the_paper_s_deviation(networks: Networks) -> None:
    option = {"embedding_perturbation": 3.0}
    drawn = draws(**option)
    plain = record(networks, objective(), draws())
    moved = record(networks, objective(noise=option), drawn)
    assert torch.equal(moved["noisy"], plain["noisy"])
    difference = moved["context"] - plain["context"]
    expected = 3.0 / TINY.text_width**0.5
    assert abs(difference.std().item() / expected - 1) < 4 / (2 * difference.numel()) ** 0.5
    assert drawn.embedding_noise is not None
    assert torch.allclose(difference, drawn.embedding_noise * expected, atol=1e-5)


def test_input_perturbation_moves_the_input_and_not_the_target(networks: Networks) -> None:
    option = {"input_perturbation": 0.5}
    goal, drawn = objective(noise=option), draws(**option)
    plain, moved = record(networks, objective(), draws()), record(networks, goal, drawn)
    assert drawn.input_noise is not None
    sigma = goal.sigma[drawn.timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(moved["noisy"] - plain["noisy"], 0.5 * sigma * drawn.input_noise, atol=1e-5)
    # A UNet that answers with exactly the plain noise has no loss left.
    perfect = dataclasses.replace(networks, unet=lambda noisy, steps, context: drawn.noise)
    assert value(perfect, goal, drawn).max() == 0


def test_mixed_losses_run_from_one_to_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, wanted = 3 * torch.randn(5, 40, generator=generator), torch.zeros(5, 40)
    mse = prediction.square().mean(1)
    size = prediction.abs()
    huber = torch.where(size < 1, 0.5 * size.square(), size - 0.5).mean(1)
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])

    def loss(name: str) -> Tensor:
        return loss_per_image(name, prediction, wanted, share)

    assert torch.allclose(loss("mse"), mse)
    assert torch.allclose(loss("huber"), huber)
    assert torch.allclose(loss("mse_huber"), share * mse + (1 - share) * huber)
    assert torch.allclose(loss("huber_mse"), share * huber + (1 - share) * mse)


def test_half_precision_networks_leave_latents_noise_and_loss_in_fp32(networks: Networks) -> None:
    seen: list[torch.dtype] = []

    def unet(noisy: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        seen.append(noisy.dtype)
        return networks.unet(noisy, steps, context).bfloat16()

    losses = value(dataclasses.replace(networks, unet=unet), objective())
    assert seen == [torch.float32]
    assert losses.dtype == torch.float32
