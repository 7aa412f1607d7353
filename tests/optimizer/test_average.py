"""EMA: its arithmetic, its pace, and that training does not notice it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.build import Memory
from optimizer.ema import Ema, ema_decay, ema_is_on
from optimizer.update import Updater
from tests.optimizer.parts import copies, losses, small_part
from utils.config import EmaOptions
from utils.errors import UserError


def weights(*values: float) -> dict[str, dict[str, Tensor]]:
    return {"unet": {"w": torch.nn.Parameter(torch.tensor(values))}}


def test_on_when_a_rate_or_a_target_is_given() -> None:
    assert not ema_is_on(EmaOptions())
    assert ema_is_on(EmaOptions(ema_decay_rate=0.0))
    assert ema_is_on(EmaOptions(ema_strength_target=0.1))


@pytest.mark.parametrize(("interval", "updates"), [(1, 100), (10, 105), (500, 999)])
def test_strength_target_is_what_is_left_of_the_start(interval: int, updates: int) -> None:
    decay = ema_decay(EmaOptions(ema_strength_target=0.05, ema_update_interval=interval), updates)
    live = weights(0.0)
    ema = Ema(weights(1.0), decay=decay, interval=interval)
    count = sum(ema.update(done, live) for done in range(1, updates + 1))
    assert count == updates // interval
    assert ema.tensors("unet")["w"].item() == pytest.approx(0.05, rel=1e-4)


def test_a_rate_is_taken_as_it_is_and_a_target_needs_an_update() -> None:
    assert ema_decay(EmaOptions(ema_decay_rate=0.99), 3) == 0.99
    with pytest.raises(UserError, match="ema_update_interval"):
        ema_decay(EmaOptions(ema_strength_target=0.05), 499)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_arithmetic_is_that_of_diffusers(decay: float) -> None:
    from diffusers.training_utils import EMAModel

    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, generator=generator))
    theirs: Any = EMAModel([weight], decay=decay, min_decay=decay)
    ours = Ema({"unet": {"w": weight}}, decay=decay, interval=1)
    for done in range(1, 20):
        with torch.no_grad():
            weight.add_(torch.randn(50, generator=generator), alpha=0.1)
        if done == 1:
            theirs.optimization_step = 1  # its first step copies
        theirs.step([weight])
        ours.update(done, {"unet": {"w": weight}})
        assert torch.allclose(ours.tensors("unet")["w"], theirs.shadow_params[0], atol=1e-6)


def test_interval_and_storage() -> None:
    live = weights(1.0, 2.0)
    ema = Ema(live, decay=0.5, interval=3)
    storage = ema.tensors("unet")["w"].data_ptr()
    assert storage != live["unet"]["w"].data_ptr()
    with torch.no_grad():
        live["unet"]["w"].fill_(5.0)
    assert [ema.update(done, live) for done in range(1, 7)] == [False, False, True, False, False, True]
    assert ema.tensors("unet")["w"].tolist() == [4.0, 4.25]
    assert ema.tensors("unet")["w"].data_ptr() == storage, "in place"
    assert not ema.tensors("unet")["w"].requires_grad


def test_training_does_not_notice() -> None:
    with_ema, without = small_part({"lr": 1e-2}), small_part({"lr": 1e-2})
    ema = Ema({"unet": with_ema.weights()}, decay=0.9, interval=2)
    for part in (with_ema, without):
        updater = Updater([part], seed=0)
        for done in range(6):
            updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
            updater.step(done)
            if part is with_ema:
                ema.update(done + 1, {"unet": part.weights()})
    average = ema.tensors("unet")
    for name, parameter in with_ema.parameters.items():
        assert torch.equal(parameter, without.parameters[name])
        assert not torch.equal(average[name], parameter)


def test_bf16_weights_are_averaged_in_fp32() -> None:
    part = small_part({"lr": 1e-2}, memory=Memory(bf16_weights=True))
    ema = Ema({"unet": part.weights()}, decay=0.999, interval=1)
    start = {name: tensor.clone() for name, tensor in ema.tensors("unet").items()}
    with torch.no_grad():
        for parameter in part.parameters.values():
            parameter.add_(0.25)
    ema.update(1, {"unet": part.weights()})
    for name, average in ema.tensors("unet").items():
        assert average.dtype == torch.float32
        expected = start[name] + 0.001 * (part.parameters[name].float() - start[name])
        assert torch.allclose(average, expected, atol=1e-7)


def test_state_goes_on_and_a_model_can_be_the_start() -> None:
    part = small_part({})
    ema = Ema({"unet": part.weights()}, decay=0.9, interval=1)
    with torch.no_grad():
        for parameter in part.parameters.values():
            parameter.add_(1.0)
    ema.update(1, {"unet": part.weights()})
    saved = {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in ema.state_dict().items()}
    again = Ema({"unet": part.weights()}, decay=0.9, interval=1)
    again.load_state_dict(saved)
    for one in (ema, again):
        one.update(2, {"unet": part.weights()})
    for name, average in ema.tensors("unet").items():
        assert torch.equal(again.tensors("unet")[name], average)

    model = copies(small_part({}, seed=4))
    again.load_tensors("unet", model | {"not trained": torch.zeros(1)})
    assert all(torch.equal(again.tensors("unet")[name], tensor) for name, tensor in model.items())
    with pytest.raises(UserError, match="other weights of the unet"):
        again.load_state_dict({"unet": {"w": torch.zeros(1)}})
    with pytest.raises(UserError, match="other weights of the unet"):
        again.load_state_dict({})
