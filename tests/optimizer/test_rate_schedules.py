"""Learning rates against Diffusers' get_scheduler, and where we leave it on purpose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from optimizer.plot import plot, rate_lines
from optimizer.schedules import build_schedule
from tests.optimizer.parts import settings
from utils.optimizer_names import SCHEDULES


def theirs(name: str, decay: int, warmup: int, **keywords: Any) -> list[float]:
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "polynomial":
        schedule = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, decay, lr_end=0.0, power=2.0)
    else:
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=decay, **keywords)
    rates = []
    for _ in range(decay + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_diffusers(name: str, warmup: int) -> None:
    ours = build_schedule(name, 10, decay=40, warmup=warmup)
    keywords = {"num_cycles": 3} if name == "cosine_with_restarts" else {}
    expected = theirs(name, 40, warmup, **keywords)
    assert [ours.factor(done) for done in range(41)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rate_rises_after_the_decay(name: str) -> None:
    schedule = build_schedule(name, 1000, decay=100, warmup=5)
    late = [schedule.factor(done) for done in range(100, 1000)]
    assert late == [late[0]] * len(late)
    assert late[0] == (1.0 if name.startswith("constant") else 0.0)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_defaults_outlast_the_run(name: str) -> None:
    schedule = build_schedule(name, 1000)
    assert (schedule.decay, schedule.warmup) == (1500, 30)
    rates = [schedule.factor(done) for done in range(1000)]
    assert rates[0] == 0.0
    assert rates[30] == max(rates) == 1.0
    assert rates[999] > 0.1
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))


def test_cycles_and_power_have_an_effect() -> None:
    def at(done: int, name: str, **base: Any) -> float:
        from optimizer.settings import schedule_of

        return schedule_of(
            settings({"lr_scheduler": name, "lr_decay_steps": 100, "lr_warmup_steps": 0, **base}), 50
        ).factor(done)

    assert at(40, "cosine_with_restarts", lr_cycles=2) != at(40, "cosine_with_restarts")
    assert at(50, "polynomial", lr_power=3.0) == pytest.approx(0.125)
    assert at(50, "polynomial") == pytest.approx(0.25)


@pytest.mark.parametrize("updates", [1, 2, 10, 64, 65, 3000])
def test_plot_has_a_mark_in_every_column(updates: int) -> None:
    schedule = build_schedule("cosine", updates)
    lines = plot(schedule.factor, updates, width=64, height=8)
    grid = [line.partition("|")[2].ljust(64) for line in lines[:8]]
    for column in range(min(64, updates)):
        assert [row[column] for row in grid].count("*") == 1
    assert all(len(line) <= 100 for line in lines)
    assert lines[-1].split() == ["update", "0", str(updates - 1)]


def test_plot_shows_a_peak_at_the_top_and_the_end_lower() -> None:
    lines = rate_lines("unet", settings({"lr_scheduler": "cosine", "lr": 2e-6}), 100)
    assert lines[0] == "unet: lr 2e-06, cosine over 150 updates, warmup 3"
    assert "*" in lines[1]
    assert "2.00e-06" in lines[1]
    last_column = max(len(line) for line in lines[1:9])
    assert len(lines[1]) < last_column


def test_flat_or_missing_rates_are_said_in_a_line() -> None:
    assert rate_lines("unet", settings({}), 100) == ["unet: lr 1e-06, constant"]
    assert rate_lines("unet", settings({"optimizer": "adacoor"}), 100) == ["unet: adacoor has no learning rate"]
