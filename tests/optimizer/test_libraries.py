"""Every optimizer against a direct use of its library, bit for bit, and through a save."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizer.adacoor import Adacoor
from optimizer.libraries import make_optimizer
from optimizer.update import Updater
from tests.optimizer.parts import copies, losses, small_part
from utils.errors import UserError
from utils.optimizer_names import PARAMETERS
from utils.tree import load_tree, same_tree, save_tree, snapshot

# For each optimizer: what the file says, and the same thing said to the library.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        {"lr": 1e-3, "betas": [0.8, 0.9], "epsilon": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "fused": True},
    ),
    "adamw8bit": (
        {"lr": 1e-3, "betas": [0.8, 0.9], "epsilon": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "lion": (
        {"lr": 1e-4, "betas": [0.8, 0.9], "weight_decay": 0.1},
        {"lr": 1e-4, "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    "lion8bit": (
        {"lr": 1e-4, "betas": [0.8, 0.9], "weight_decay": 0.1},
        {"lr": 1e-4, "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    "prodigy": (
        {
            "lr": 0.5,
            "betas": [0.8, 0.9],
            "epsilon": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "decouple": False,
            "growth_rate": 1.01,
            "use_bias_correction": True,
            "safeguard_warmup": True,
        },
        {
            "lr": 0.5,
            "betas": (0.8, 0.9),
            "eps": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "decouple": False,
            "growth_rate": 1.01,
            "use_bias_correction": True,
            "safeguard_warmup": True,
        },
    ),
    "dadapt_adam": (
        {
            "lr": 0.5,
            "betas": [0.8, 0.9],
            "epsilon": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "decouple": True,
            "growth_rate": 1.01,
            "use_bias_correction": True,
        },
        {
            "lr": 0.5,
            "betas": (0.8, 0.9),
            "eps": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "decouple": True,
            "growth_rate": 1.01,
            "use_bias_correction": True,
        },
    ),
    "dadapt_lion": (
        {"lr": 0.5, "betas": [0.8, 0.9], "weight_decay": 0.1, "d0": 0.1},
        {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.1, "d0": 0.1},
    ),
    "dadapt_sgd": (
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "d0": 1e-5, "growth_rate": 1.01},
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "d0": 1e-5, "growth_rate": 1.01},
    ),
    "dadapt_adan": (
        {
            "lr": 0.5,
            "betas": [0.9, 0.8, 0.9],
            "epsilon": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "no_prox": True,
            "growth_rate": 1.01,
        },
        {
            "lr": 0.5,
            "betas": (0.9, 0.8, 0.9),
            "eps": 1e-7,
            "weight_decay": 0.1,
            "d0": 1e-5,
            "no_prox": True,
            "growth_rate": 1.01,
        },
    ),
    "adafactor": ({"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 0.1}),
    "adamw_schedulefree": (
        {"lr": 1e-3, "betas": [0.8, 0.9], "epsilon": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "coordinate_dowg": ({"epsilon": 1e-3}, {"eps": 1e-3}),
    "scalar_dowg": ({"epsilon": 1e-3}, {"eps": 1e-3}),
    "adacoor": ({"epsilon": 1e-4}, {"eps": 1e-4}),
}


def direct(name: str, parameters: Iterable[nn.Parameter], keywords: dict[str, Any]) -> Any:
    """The library's own class, as its readme would have it used."""
    import bitsandbytes
    import dadaptation
    import dowg
    import lion_pytorch
    import prodigyopt
    import schedulefree

    classes: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw8bit": bitsandbytes.optim.AdamW8bit,
        "lion": lion_pytorch.Lion,
        "lion8bit": bitsandbytes.optim.Lion8bit,
        "prodigy": prodigyopt.Prodigy,
        "dadapt_adam": dadaptation.DAdaptAdam,
        "dadapt_lion": dadaptation.DAdaptLion,
        "dadapt_sgd": dadaptation.DAdaptSGD,
        "dadapt_adan": dadaptation.DAdaptAdan,
        "adafactor": torch.optim.Adafactor,
        "adamw_schedulefree": schedulefree.AdamWScheduleFree,
        "coordinate_dowg": dowg.CoordinateDoWG,
        "scalar_dowg": dowg.ScalarDoWG,
        "adacoor": Adacoor,
    }
    optimizer = classes[name](list(parameters), **keywords)
    if name == "adamw_schedulefree":
        optimizer.train()
    if name == "coordinate_dowg":  # its x0 would be the weights themselves, see optimizer/libraries.py
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["x0"] = parameter.detach().clone()
    return optimizer


def test_every_optimizer_has_a_case() -> None:
    assert set(CASES) == set(PARAMETERS)
    for name, (in_file, _) in CASES.items():
        assert set(in_file) == set(PARAMETERS[name]), "every parameter of the table is tried"


@pytest.mark.parametrize("name", CASES)
def test_ten_updates_are_the_library_s_own(name: str) -> None:
    in_file, keywords = CASES[name]
    part, twin = small_part({"optimizer": name, **in_file}), small_part({})
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = direct(name, twin.module.parameters(), keywords)
    updater = Updater([part], seed=0)
    for done in range(10):
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        updater.step(done)
        optimizer.zero_grad()
        (losses(twin, done).sum() / 4).backward()  # type: ignore[no-untyped-call]
        optimizer.step(*([lambda: 0.0] if name == "scalar_dowg" else []))
    start = small_part({})
    for key, parameter in part.parameters.items():
        assert torch.equal(parameter, twin.parameters[key]), key
        assert not torch.equal(parameter, start.parameters[key]), f"{key} never moved"


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_of_the_table_has_an_effect(name: str) -> None:
    def after(given: dict[str, Any]) -> torch.Tensor:
        part = small_part({"optimizer": name, **given})
        updater = Updater([part], seed=0)
        for done in range(12):  # on one batch: rates that are found grow only where gradients agree
            updater.backward(losses(part, 0, batch=16), torch.ones(16), 16, done=done, last=True)
            updater.step(done)
        return torch.cat([parameter.detach().flatten() for parameter in part.parameters.values()])

    in_file = CASES[name][0]
    everything = after(in_file)
    for missing in in_file:
        others = {key: value for key, value in in_file.items() if key != missing}
        assert not torch.equal(after(others), everything), missing


@pytest.mark.parametrize("name", CASES)
def test_state_survives_a_save_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = {"optimizer": name, **CASES[name][0]}

    def train(part: Any, updater: Updater, start: int, stop: int) -> None:
        for done in range(start, stop):
            updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
            updater.step(done)

    part = small_part(base)
    updater = Updater([part], seed=0)
    train(part, updater, 0, 4)
    save_tree(tmp_path, "state", updater.state_dict())
    saved_weights, saved = copies(part), snapshot(updater.state_dict())
    train(part, updater, 4, 8)

    again = small_part(base, seed=9)
    for key, parameter in again.parameters.items():
        parameter.data.copy_(saved_weights[key])
    resumed = Updater([again], seed=0)
    assert resumed.load_state_dict(load_tree(tmp_path, "state")) == []
    assert same_tree(snapshot(resumed.state_dict()), saved)
    train(again, resumed, 4, 8)
    for key, parameter in part.parameters.items():
        assert torch.equal(parameter, again.parameters[key]), key
    assert same_tree(snapshot(resumed.state_dict()), snapshot(updater.state_dict()))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("lion", "lion_pytorch", "lion-pytorch"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("adamw_schedulefree", "schedulefree", "schedulefree"),
        ("scalar_dowg", "dowg", "dowg"),
    ],
)
def test_a_missing_library_is_never_answered_with_another(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_optimizer(name, [nn.Parameter(torch.zeros(3))], 1e-3, {})


def test_the_library_s_chatter_stays_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    small_part({"optimizer": "prodigy", "weight_decay": 0.1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", CASES)
def test_a_rate_of_zero_changes_nothing_and_breaks_nothing(name: str) -> None:
    if "lr" not in PARAMETERS[name]:
        return
    part = small_part({"optimizer": name, **CASES[name][0], "lr": 0.0})
    before = copies(part)
    updater = Updater([part], seed=0)
    for done in range(2):
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        updater.step(done)
    assert all(torch.equal(parameter, before[key]) for key, parameter in part.parameters.items())


def test_adacoor_is_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Adacoor([weight], eps=1e-2)
    v, expected = torch.zeros(3), weight.detach().clone()
    for step in range(5):
        gradient = torch.tensor([0.5, -1.0, 2.0]) * (step + 1)
        weight.grad = gradient.clone()
        optimizer.step()
        exact = v.float() + 1e-2 * gradient**2
        v = exact.bfloat16()
        expected -= 1e-2 * gradient / (exact.sqrt() + 1e-2)
    assert torch.allclose(weight, expected, rtol=1e-6)
    assert optimizer.state[weight]["v"].dtype == torch.bfloat16


def test_schedule_free_answers_with_the_average_and_leaves_the_live_weights() -> None:
    import schedulefree

    part, twin = small_part({"optimizer": "adamw_schedulefree", "lr": 1e-2}), small_part({})
    optimizer = schedulefree.AdamWScheduleFree(list(twin.module.parameters()), lr=1e-2)
    optimizer.train()
    updater = Updater([part], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(part.weights().values(), copies(part).values(), strict=True))
    for done in range(3):
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        updater.step(done)
        optimizer.zero_grad()
        losses(twin, done).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    live = copies(part)
    answer = part.weights()
    optimizer.eval()
    for key, parameter in twin.parameters.items():
        assert torch.allclose(answer[key], parameter, atol=1e-7)
        assert not torch.equal(answer[key], live[key])
        assert torch.equal(part.parameters[key], live[key])
