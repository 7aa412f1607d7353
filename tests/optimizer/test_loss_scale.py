"""The loss scale against torch's GradScaler, and how its growth slows."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from optimizer.loss_scale import BACKOFF, GROWTH, INITIAL_SCALE, LossScale
from optimizer.update import Updater
from tests.optimizer.parts import losses, small_part


def test_it_starts_where_it_should() -> None:
    assert LossScale("cpu").scale.item() == pytest.approx(2**17.5)


def test_it_moves_as_grad_scaler_does() -> None:
    ours = LossScale("cpu", tweaks=False)
    theirs = torch.amp.GradScaler(
        "cpu", init_scale=INITIAL_SCALE, growth_factor=GROWTH, backoff_factor=BACKOFF, growth_interval=2000
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    rng = random.Random(3)
    for done in range(6000):
        bad = rng.random() < 0.0005 or done == 10
        theirs.scale(weight.sum())
        weight.grad = torch.full((1,), float("inf") if bad else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(bad)), done)
        assert ours.scale.item() == theirs.get_scale()
    assert ours.scale.item() != INITIAL_SCALE


def test_tweaks_slow_the_growth_at_their_updates() -> None:
    scale = LossScale("cpu", tweaks=True)

    def growth_per_thousand(done: int) -> float:
        factor, interval = scale.pace(done)
        return float(factor ** (1000 / interval))

    edges = [0, 500, 1000, 2000, 4000]
    rates = [growth_per_thousand(edge) for edge in edges]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 5
    for before, edge in itertools.pairwise(edges):
        assert scale.pace(edge - 1) == scale.pace(before)
        assert scale.pace(edge) != scale.pace(edge - 1)
    assert LossScale("cpu", tweaks=False).pace(0) == LossScale("cpu", tweaks=False).pace(9999)


def test_an_overflow_halves_the_scale_and_skips_the_update() -> None:
    part = small_part({})
    updater = Updater([part], seed=0, loss_scale=LossScale("cpu"))
    assert updater.loss_scale is not None
    before = [parameter.detach().clone() for parameter in part.parameters.values()]
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=True)
    gradient = part.parameters["0.bias"].grad
    assert gradient is not None
    gradient[0] = float("inf")
    result = updater.step(0)
    assert torch.isfinite(result.loss)
    assert not result.applied
    assert updater.loss_scale.scale.item() == pytest.approx(2**16.5)
    assert all(torch.equal(a, b) for a, b in zip(before, part.parameters.values(), strict=True))


def test_state_goes_on() -> None:
    first, second = LossScale("cpu"), LossScale("cpu")
    for done in range(20):
        first.update(torch.tensor(float(done == 3)), done)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for done in range(20, 60):
        for scale in (first, second):
            scale.update(torch.tensor(0.0), done)
        assert torch.equal(first.scale, second.scale)
    assert first.scale.item() > 2**16.5
