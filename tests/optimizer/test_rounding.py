"""Weights in bf16: stochastic rounding is right on average, and small updates add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimizer.build import Memory
from optimizer.loss_scale import LossScale
from optimizer.stepping import stochastic_round
from optimizer.update import Updater
from tests.optimizer.parts import copies, losses, small_part
from utils.errors import UserError

BF16 = Memory(bf16_weights=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 2**-9, 1e-6, -3.14159, 1e-40, 0.0, 65504.0])
def test_rounding_is_right_on_average(value: float) -> None:
    values = torch.full((200_000,), value)
    rounded = stochastic_round(values, generator()).double()
    neighbours = torch.tensor(sorted(set(rounded.tolist())), dtype=torch.float64)
    assert len(neighbours) <= 2
    assert neighbours.min() <= values[0].double() <= neighbours.max()
    error = rounded.std().item() / math.sqrt(len(rounded))
    assert abs(rounded.mean().item() - values[0].double().item()) <= 4 * error


def test_what_bf16_holds_stays() -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = everything[everything.isfinite()]
    assert torch.equal(stochastic_round(finite.float(), generator()), finite)
    infinite = torch.tensor([math.inf, -math.inf])
    assert torch.equal(stochastic_round(infinite, generator()).float(), infinite)


def test_strided_values_are_rounded_in_place_of_their_own() -> None:
    values = torch.randn(6, 4, generator=generator(1)).t()
    rounded = stochastic_round(values, generator())
    assert rounded.shape == values.shape
    assert torch.allclose(rounded.float(), values, rtol=2**-7)


def follow(memory: Memory | None, dtype: torch.dtype) -> Tensor:
    """Where 2,000 updates of a rate of 1e-6 take weights that a constant pull draws down: the mean way gone."""
    part = small_part({"lr": 1e-6, "weight_decay": 0}, memory=memory)
    part.module.to(dtype)
    with torch.no_grad():
        for parameter in part.parameters.values():
            parameter.fill_(1.0)
    updater = Updater([part], seed=0)
    for done in range(2000):
        total = sum(parameter.float().sum() for parameter in part.parameters.values())
        assert isinstance(total, Tensor)
        updater.backward(total[None], torch.ones(1), 1, done=done, last=True)
        updater.step(done)
    return torch.cat([parameter.detach().float().flatten() for parameter in part.parameters.values()]).double()


def test_two_thousand_small_updates_follow_fp32_where_plain_bf16_stands_still() -> None:
    full, plain, rounded = follow(None, torch.float32), follow(None, torch.bfloat16), follow(BF16, torch.bfloat16)
    assert full.mean().item() == pytest.approx(1 - 2000e-6, abs=5e-5)
    assert (plain == 1).all(), "bf16 has steps of 1/256 below 1: an update of 1e-6 is lost"
    error = rounded.std().item() / math.sqrt(len(rounded))
    assert error < 1e-4
    assert abs(rounded.mean().item() - full.mean().item()) < 4 * error


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adafactor", "adacoor", "coordinate_dowg"])
def test_any_optimizer_learns_in_bf16_and_keeps_bf16(optimizer: str) -> None:
    part = small_part({"optimizer": optimizer, "lr": 1e-3}, memory=BF16)
    updater = Updater([part], seed=0, clip_grad_norm=10.0)
    pointers = [parameter.data_ptr() for parameter in part.parameters.values()]
    first = last = torch.zeros(())
    for done in range(40):
        updater.backward(losses(part, 0, batch=16), torch.ones(16), 16, done=done, last=True)
        last = updater.step(done).loss
        first = last if done == 0 else first
    assert last < 0.99 * first
    assert [parameter.data_ptr() for parameter in part.parameters.values()] == pointers
    for parameter in part.parameters.values():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        for group in part.optimizers:
            for value in group.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert value.dtype in (torch.bfloat16, torch.uint8)


def test_rounding_is_a_function_of_seed_and_update() -> None:
    def train(seed: int, stop: int | None = None) -> dict[str, Tensor]:
        part = small_part({"lr": 1e-3}, memory=BF16)
        updater = Updater([part], seed=seed)
        for done in range(6):
            if done == stop:
                again = small_part({"lr": 1e-3}, seed=8, memory=BF16)
                for name, parameter in again.parameters.items():
                    parameter.data.copy_(part.parameters[name])
                resumed = Updater([again], seed=seed)
                resumed.load_state_dict(updater.state_dict())
                part, updater = again, resumed
            updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
            updater.step(done)
        return copies(part)

    base, resumed, other = train(1), train(1, stop=3), train(2)
    assert all(torch.equal(base[name], resumed[name]) for name in base)
    assert not all(torch.equal(base[name], other[name]) for name in base)


def test_a_bad_update_leaves_bf16_weights_alone() -> None:
    part = small_part({"lr": 1e-3}, memory=BF16)
    updater = Updater([part], seed=0)
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=True)
    updater.step(0)
    before = copies(part)
    updater.backward(losses(part, 1) * float("nan"), torch.ones(4), 4, done=1, last=True)
    assert not updater.step(1).applied
    assert all(torch.equal(parameter, before[name]) for name, parameter in part.parameters.items())


def test_bf16_weights_do_not_go_with_fp16() -> None:
    with pytest.raises(UserError, match="amp_dtype"):
        Updater([small_part({}, memory=BF16)], seed=0, loss_scale=LossScale("cpu"))
