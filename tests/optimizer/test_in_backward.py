"""Steps inside the backward pass: the same updates, and never all gradients at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizer.build import Memory
from optimizer.in_backward import UpdaterInBackward
from optimizer.loss_scale import LossScale
from optimizer.update import Updater
from tests.optimizer.parts import copies, losses, small_part
from utils.errors import UserError
from utils.tree import snapshot

INSIDE = Memory(step_in_backward=True)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adafactor", "adamw_schedulefree", "adacoor"])
def test_updates_are_the_same(optimizer: str) -> None:
    base = {"optimizer": optimizer, "lr": 1e-3, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    inside, after = small_part(base, memory=INSIDE), small_part(base)
    inner, outer = UpdaterInBackward([inside], seed=0), Updater([after], seed=0)
    for done in range(6):
        for part, updater in ((inside, inner), (after, outer)):
            for start in (0, 2):  # two micro-batches, as at a bucket's edge
                updater.backward(losses(part, done)[start : start + 2], torch.ones(2), 4, done=done, last=start == 2)
        results = inner.step(done), outer.step(done)
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.allclose(results[0].grad_norms["unet"], results[1].grad_norms["unet"])
        assert results[0].rates == results[1].rates
        assert results[0].applied
    weights = copies(after)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in inside.parameters.items())


def test_gradients_never_all_exist() -> None:
    part = small_part({"lr": 1e-3}, memory=INSIDE)
    updater = UpdaterInBackward([part], seed=0)
    most: list[int] = []

    def watch(_parameter: nn.Parameter) -> None:
        most.append(sum(p.grad is not None for p in part.parameters.values()))

    for parameter in part.parameters.values():
        parameter.register_post_accumulate_grad_hook(watch)  # type: ignore[no-untyped-call]
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=True)
    assert len(most) == len(part.parameters)
    assert max(most) == 0, "each was used and dropped before the next one came"


def test_an_infinite_loss_with_finite_gradients_stops_the_update() -> None:
    part = small_part({"lr": 1e-3}, memory=INSIDE)
    updater = UpdaterInBackward([part], seed=0)
    before = copies(part)
    updater.backward(losses(part, 0) + float("inf"), torch.ones(4), 4, done=0, last=True)
    assert not updater.step(0).applied
    assert all(torch.equal(parameter, before[name]) for name, parameter in part.parameters.items())


def test_a_bad_loss_stops_the_update_and_a_bad_gradient_its_weight() -> None:
    part = small_part({"lr": 1e-3}, memory=INSIDE)
    updater = UpdaterInBackward([part], seed=0)
    before = copies(part)
    updater.backward(losses(part, 0) * float("nan"), torch.ones(4), 4, done=0, last=True)
    assert not updater.step(0).applied
    assert all(torch.equal(parameter, before[name]) for name, parameter in part.parameters.items())
    # Infinite from here on back: the last bias has its gradient already.
    part.module[1].register_full_backward_hook(lambda module, given, out: (given[0] * float("inf"),))  # type: ignore[index]
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=True)
    assert not updater.step(0).applied
    assert updater.skipped() == (2, 2)
    assert torch.equal(part.parameters["0.weight"], before["0.weight"])
    assert not torch.equal(part.parameters["2.bias"], before["2.bias"])
    assert all(torch.isfinite(parameter).all() for parameter in part.parameters.values())


def test_state_goes_on_bit_for_bit() -> None:
    part = small_part({"lr": 1e-3}, memory=INSIDE)
    updater = UpdaterInBackward([part], seed=0)
    again = small_part({"lr": 1e-3}, seed=5, memory=INSIDE)
    resumed = UpdaterInBackward([again], seed=0)
    for done in range(6):
        if done == 3:
            resumed.load_state_dict(snapshot(updater.state_dict()))
            for name, parameter in again.parameters.items():
                parameter.data.copy_(part.parameters[name])
        for one, its_updater in ((part, updater), (again, resumed)):
            if one is part or done >= 3:
                its_updater.backward(losses(one, done), torch.ones(4), 4, done=done, last=True)
                its_updater.step(done)
    weights = copies(part)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in again.parameters.items())
    with pytest.raises(UserError, match="step_in_backward"):
        Updater([small_part({})], seed=0).load_state_dict(updater.state_dict())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"clip_grad_norm": 1.0}, "clip_grad_norm"),
        ({"grad_accum": 2}, "grad_accum = 2"),
        ({"loss_scale": LossScale("cpu")}, "fp16"),
        ({"sum_over_processes": lambda loss: loss}, "one process"),
    ],
)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        UpdaterInBackward([small_part({}, memory=INSIDE)], seed=0, **options)


def test_bf16_and_steps_inside_go_together() -> None:
    memory = Memory(bf16_weights=True, step_in_backward=True)
    part = small_part({"optimizer": "adamw8bit", "lr": 1e-3}, memory=memory)
    updater = UpdaterInBackward([part], seed=0)
    values = []
    for done in range(30):
        updater.backward(losses(part, 0, batch=16), torch.ones(16), 16, done=done, last=True)
        values.append(updater.step(done).loss.item())
    assert values[-1] < 0.98 * values[0]
    assert all(parameter.dtype == torch.bfloat16 for parameter in part.parameters.values())
