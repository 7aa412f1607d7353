"""Draws: a function of what they are for, with the statistics that their options promise."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.noise import Drawer, Draws, pyramid_noise
from tests.optimizer.parts import asked
from utils.config import NoiseOptions

NAMES = [f"folder/{number}.jpg" for number in range(400)]


def drawer(seed: int = 1, **options: Any) -> Drawer:
    quiet = {"zero_frequency_noise_ratio": 0.0}
    return Drawer(NoiseOptions(**(quiet | options)), seed, 4, 8, (7, 16))


def tensors(draws: Draws) -> list[Tensor]:
    values = (draws.timesteps, draws.noise, draws.latent_noise, draws.embedding_noise, draws.input_noise)
    return [value for value in values if value is not None]


def everything(**options: Any) -> Drawer:
    return drawer(
        pyramid_noise_discount=0.4,
        zero_frequency_noise_ratio=0.1,
        embedding_perturbation=1.0,
        input_perturbation=0.1,
        **options,
    )


def test_shapes_follow_bucket_and_options() -> None:
    wide = asked(NAMES[:3], side=64)
    draws = everything()(type(wide)((128, 64), wide.visits, 0, 3))
    assert draws.timesteps.shape == (3,)
    assert draws.timesteps.dtype == torch.int64
    assert draws.noise.shape == draws.latent_noise.shape == (3, 4, 8, 16)
    assert draws.embedding_noise is not None
    assert draws.embedding_noise.shape == (3, 7, 16)
    assert draws.input_noise is not None
    assert draws.input_noise.shape == (3, 4, 8, 16)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(draws)[1:])
    plain = drawer()(asked(NAMES[:3]))
    assert plain.embedding_noise is None
    assert plain.input_noise is None


def test_a_visit_draws_the_same_in_any_company() -> None:
    whole = everything()(asked(NAMES[:4]))
    for row in range(4):
        alone = everything()(asked(NAMES[row : row + 1]))
        for one, all_ in zip(tensors(alone), tensors(whole), strict=True):
            assert torch.equal(one[0], all_[row])


def test_every_key_of_a_visit_counts() -> None:
    first = asked(NAMES[:1])
    base = drawer()(first).noise
    item, epoch, repeat = first.visits[0].item, first.visits[0].epoch, first.visits[0].repeat
    for changed in (
        drawer(seed=2)(first),
        drawer()(asked(NAMES[1:2])),
        drawer()(asked(NAMES[:1], epoch=epoch + 1)),
        drawer()(
            type(first)((64, 64), (type(first.visits[0])(item, first.visits[0].bucket, epoch, repeat + 1),), 0, 1)
        ),
    ):
        assert not torch.equal(base, changed.noise)


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("embedding_perturbation", 1.0, "embedding_noise"),
        ("input_perturbation", 0.1, "input_noise"),
        ("zero_frequency_noise_ratio", 0.1, "noise"),
        ("pyramid_noise_discount", 0.4, "noise"),
        ("timestep_start", 500, "timesteps"),
        ("timestep_end", 10, "timesteps"),
        ("timestep_sampling", "logit_normal", "timesteps"),
        ("timestep_sampling", "stratified", "timesteps"),
    ],
)
def test_an_option_changes_its_own_draw_and_no_other(option: str, value: Any, field: str) -> None:
    request = asked(NAMES[:8])
    plain, changed = drawer()(request), drawer(**{option: value})(request)
    for name in Draws.__slots__:
        before, after = getattr(plain, name), getattr(changed, name)
        same = (before is None and after is None) or (
            before is not None and after is not None and torch.equal(before, after)
        )
        assert same == (name != field), name


def test_global_generators_are_left_alone() -> None:
    python, tensor = random.getstate(), torch.get_rng_state()
    everything(timestep_sampling="logit_normal")(asked(NAMES[:2]))
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), tensor)


def test_drawer_goes_through_pickle_and_draws_split_by_rows() -> None:
    request = asked(NAMES[:4])
    whole = everything()(request)
    copy = pickle.loads(pickle.dumps(everything()))(request)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(copy), strict=True))
    halves = whole.rows(0, 2), whole.rows(2, 4)
    for tensor, first, second in zip(tensors(whole), *map(tensors, halves), strict=True):
        assert torch.equal(tensor, torch.cat([first, second]))
    assert torch.equal(whole.to("cpu").noise, whole.noise)


def within(values: Tensor, expected: float) -> None:
    """The mean of independent `values` lies within 4 standard errors of `expected`."""
    values = values.double().flatten()
    error = values.std().item() / math.sqrt(values.numel())
    assert abs(values.mean().item() - expected) < 4 * error, (values.mean().item(), expected, error)


def test_noise_is_normal() -> None:
    draws = drawer(embedding_perturbation=1.0, input_perturbation=1.0)(asked(NAMES))
    for noise in tensors(draws)[1:]:
        within(noise, 0.0)
        within(noise.square(), 1.0)
        within(noise.double() ** 4, 3.0)
    within(draws.noise * draws.latent_noise, 0.0)


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_offset_noise_moves_each_image_and_channel_by_the_ratio(ratio: float) -> None:
    offset = (drawer(zero_frequency_noise_ratio=ratio)(asked(NAMES)).noise - drawer()(asked(NAMES)).noise).double()
    assert offset.std((2, 3)).max() < 1e-6, "the offset is the same all over a channel"
    moves = offset.mean((2, 3))
    within(moves, 0.0)
    within(moves.square(), ratio**2)
    within(moves[:, 0] * moves[:, 1], 0.0)


def test_minus_one_means_no_offset() -> None:
    request = asked(NAMES[:4])
    assert torch.equal(drawer(zero_frequency_noise_ratio=-1.0)(request).noise, drawer()(request).noise)


def test_pyramid_noise_has_unit_deviation_in_every_image() -> None:
    noise = drawer(pyramid_noise_discount=0.9)(asked(NAMES[:20])).noise
    assert torch.allclose(noise.flatten(1).std(1), torch.ones(20), atol=1e-5)
    request = asked(NAMES[:4])
    assert torch.equal(drawer(pyramid_noise_discount=0.0)(request).noise, drawer()(request).noise), "0 is off"


def spectrum(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Power at the lowest frequencies and at the highest ones, a value an image."""
    power = torch.fft.rfft2(noise.double()).abs().square().mean(1)
    return power[:, 0:2, 0:2].mean((1, 2)), power[:, 6:11, 6:9].mean((1, 2))


def test_pyramid_noise_is_stronger_the_coarser_it_is_and_the_larger_the_discount() -> None:
    ratios = []
    for discount in (None, 0.3, 0.9):
        generator = torch.Generator().manual_seed(4)
        images = []
        for _ in range(200):
            noise = torch.randn(4, 16, 16, generator=generator)
            images.append(noise if discount is None else pyramid_noise(noise, discount, generator))
        low, high = spectrum(torch.stack(images))
        ratios.append((low.mean() / high.mean()).item())
        if discount is None:
            within(low / 256, 1.0)
            within(high / 256, 1.0)
    assert ratios[0] < 1.2 < ratios[1] < ratios[2]
    assert ratios[2] > 5


def test_the_first_level_of_the_pyramid_keeps_full_size() -> None:
    # A discount near 0 leaves two full-size levels, so the sum is white and independent of the discount.
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 16, 16, generator=generator)
    blended = pyramid_noise(noise, 1e-6, generator)
    shared = (noise * blended).mean().item()
    assert abs(shared - math.sqrt(0.5)) < 4 / math.sqrt(noise.numel())


def timesteps(**options: Any) -> Tensor:
    return drawer(**options)(asked(NAMES * 1)).timesteps


def test_uniform_timesteps_fill_the_range_evenly() -> None:
    steps = timesteps(timestep_start=200, timestep_end=700).double()
    assert steps.min() >= 200
    assert steps.max() <= 699
    within(steps, (200 + 699) / 2)
    within((steps - 449.5).square(), (500**2 - 1) / 12)
    assert (timesteps(timestep_start=0, timestep_end=1) == 0).all()
    assert (timesteps(timestep_start=999, timestep_end=1000) == 999).all()


def test_logit_normal_timesteps_prefer_the_middle() -> None:
    share = (timesteps(timestep_sampling="logit_normal").double() + 0.5) / 1000
    logits = torch.log(share / (1 - share))
    within(logits, 0.0)
    within(logits.square(), 1.0)


def test_stratified_timesteps_take_one_from_each_stratum() -> None:
    for update in range(5):
        draws = [
            drawer(timestep_sampling="stratified")(
                asked(NAMES[start : start + 4], first=start, images=8, update=update)
            )
            for start in (0, 4)
        ]
        steps = torch.cat([draw.timesteps for draw in draws])
        assert sorted((steps // 125).tolist()) == list(range(8))


def test_stratified_timesteps_do_not_depend_on_how_the_update_is_cut() -> None:
    draw = drawer(timestep_sampling="stratified")
    whole = draw(asked(NAMES[:6], update=3)).timesteps
    for size in (1, 2, 3):
        parts = [draw(asked(NAMES[i : i + size], first=i, images=6, update=3)).timesteps for i in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_place_of_a_stratified_update_gets_all_timesteps() -> None:
    draw = drawer(timestep_sampling="stratified")
    firsts = [draw(asked(NAMES[:1], first=0, images=4, update=update)).timesteps for update in range(400)]
    steps = torch.cat(firsts).double()
    within(steps, 499.5)
    within((steps - 499.5).square(), (1000**2 - 1) / 12)
