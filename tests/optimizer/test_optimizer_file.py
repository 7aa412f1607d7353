"""The optimizer file: old files run as they are, every mistake is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimizer.settings import Settings, part_settings
from utils.config import OptimizerOptions
from utils.errors import ProblemsError
from utils.optimizer_file import OptimizerFile, load_optimizer_file, parse_optimizer_file
from utils.optimizer_names import PARAMETERS

OLD_FILE = {
    "doc": {"base": "the unet", "anything": [1, 2]},
    "base": {
        "optimizer": "adamw8bit",
        "lr": 2e-6,
        "lr_scheduler": "cosine",
        "lr_decay_steps": None,
        "lr_warmup_steps": None,
        "betas": [0.9, 0.999],
        "epsilon": 1e-8,
        "weight_decay": 0.010,
    },
    "text_encoder_overrides": {
        "optimizer": None,
        "lr": 5e-7,
        "lr_scheduler": None,
        "lr_decay_steps": 100,
        "lr_warmup_steps": 0,
        "betas": None,
        "epsilon": None,
        "weight_decay": 0,
    },
    "text_encoder_lr_scale": 0.5,
    "text_encoder_freezing": {"unfreeze_last_n_layers": None, "freeze_embeddings": None},
    "apply_grad_scaler_step_tweaks": False,
    "log_grad_norm": False,
}


def merged(raw: dict[str, Any], images: int = 1, **options: Any) -> Settings:
    return part_settings(parse_optimizer_file(raw, "o.json"), OptimizerOptions(**options), images)


def problems(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ProblemsError) as caught:
        parse_optimizer_file(raw, "o.json")
    return {problem.key: problem.remedy for problem in caught.value.problems}


def test_an_old_file_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    path.write_text(json.dumps(OLD_FILE), encoding="utf-8")
    file = load_optimizer_file(path)
    assert file.values.apply_grad_scaler_step_tweaks is False
    assert file.values.log_grad_norm is False
    both = part_settings(file, OptimizerOptions(), 1)
    assert both.unet.optimizer == both.text_encoder.optimizer == "adamw8bit"
    assert (both.unet.lr, both.text_encoder.lr) == (2e-6, 5e-7)
    assert both.unet.parameters == {"betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.01}
    assert both.text_encoder.parameters == {"betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.0}
    assert (both.unet.lr_decay_steps, both.text_encoder.lr_decay_steps) == (None, 100)
    assert both.text_encoder.lr_warmup_steps == 0
    assert both.text_encoder.lr_scheduler == "cosine"
    assert both.notes == ()


def test_a_missing_default_file_is_said_and_a_missing_named_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = load_optimizer_file("optimizer.json")
    assert file == OptimizerFile(notes=file.notes)
    assert "optimizer.json" in file.notes[0]
    with pytest.raises(ProblemsError, match=r"mine\.json"):
        load_optimizer_file("mine.json")


def test_defaults() -> None:
    both = merged({})
    assert both.unet.optimizer is None
    assert (both.unet.lr, both.text_encoder.lr) == (1e-6, 5e-7)
    assert both.unet.lr_scheduler == "constant"


def test_all_mistakes_at_once() -> None:
    found = problems(
        {
            "base": {"optimizer": "adamw9bit", "lr": "fast", "lrr": 1, "betas": [0.9, 2]},
            "text_encoder_overrides": {"optimizer": "sgd", "weight_decay": -1, "lr_scheduler": "cosin"},
            "text_encoder_freezing": 3,
            "text_encoder_lr_scal": 0.5,
            "log_grad_norm": "yes",
        }
    )
    assert sorted(found) == sorted(
        [
            "base.optimizer",
            "base.lr",
            "base.lrr",
            "base.betas",
            "text_encoder_overrides.optimizer",
            "text_encoder_overrides.weight_decay",
            "text_encoder_overrides.lr_scheduler",
            "text_encoder_freezing",
            "text_encoder_lr_scal",
            "log_grad_norm",
        ]
    )
    assert "did you mean lr?" in found["base.lrr"]
    assert "did you mean text_encoder_lr_scale?" in found["text_encoder_lr_scal"]
    for key in ("base.optimizer", "text_encoder_overrides.optimizer"):
        assert all(name in found[key] for name in PARAMETERS)


@pytest.mark.parametrize("betas", [0.9, [0.9], "0.9", [0.9, "x"], [0.9, True], [1.0, 0.9], [0.1, 0.2, 0.3], {}])
def test_wrong_betas(betas: Any) -> None:
    assert list(problems({"base": {"betas": betas}})) == ["base.betas"]
    assert list(problems({"base": {"optimizer": "dadapt_adan", "betas": [0.9, 0.99]}})) == ["base.betas"]
    assert merged({"base": {"optimizer": "dadapt_adan", "betas": [0.9, 0.9, 0.99]}}).unet.parameters["betas"][2] == 0.99


def test_parameters_of_another_optimizer_are_errors_that_list_the_right_ones() -> None:
    found = problems({"base": {"optimizer": "adamw", "d0": 1e-6, "momentum": 0.9}})
    assert sorted(found) == ["base.d0", "base.momentum"]
    assert found["base.d0"] == "adamw does not take it; it takes lr, betas, epsilon, weight_decay"
    assert list(problems({"text_encoder_overrides": {"optimizer": "lion", "d0": 1.0}})) == ["text_encoder_overrides.d0"]


def test_values_that_every_old_file_carries_are_noted_instead() -> None:
    both = merged({"base": {"optimizer": "adacoor", "lr": 1e-6, "betas": [0.9, 0.999], "epsilon": 1e-8}})
    assert both.unet.parameters == {"epsilon": 1e-8}
    assert [note.split(" has")[0] for note in both.notes] == ["o.json: base.betas", "o.json: base.lr"]


def test_a_text_encoder_of_another_kind_drops_what_it_inherits_and_cannot_use() -> None:
    both = merged({"base": {"optimizer": "prodigy", "d0": 1e-5}, "text_encoder_overrides": {"optimizer": "adamw"}})
    assert both.unet.parameters == {"d0": 1e-5}
    assert both.text_encoder.parameters == {}
    assert (both.unet.lr, both.text_encoder.lr) == (1.0, 5e-7)


def test_betas_are_inherited_only_where_their_number_fits() -> None:
    three = {"optimizer": "dadapt_adan", "betas": [0.9, 0.9, 0.99]}
    assert merged({"base": three, "text_encoder_overrides": {"optimizer": "adamw"}}).text_encoder.parameters == {}
    adan = {"optimizer": "dadapt_adan"}
    assert merged({"base": {"betas": [0.9, 0.99]}, "text_encoder_overrides": adan}).text_encoder.parameters == {}
    assert merged({"base": three}).text_encoder.parameters == {"betas": [0.9, 0.9, 0.99]}


def test_flags_set_the_base_and_the_text_encoder_keeps_its_ratio() -> None:
    both = merged(OLD_FILE, lr=4e-6, lr_scheduler="linear", lr_decay_steps=7, lr_warmup_steps=3)
    assert both.unet.lr == 4e-6
    assert both.text_encoder.lr == pytest.approx(1e-6)
    assert (both.unet.lr_scheduler, both.text_encoder.lr_scheduler) == ("linear", "linear")
    assert (both.unet.lr_decay_steps, both.text_encoder.lr_decay_steps) == (7, 100)
    assert (both.unet.lr_warmup_steps, both.text_encoder.lr_warmup_steps) == (3, 0)
    scaled = merged({"text_encoder_lr_scale": 0.1}, lr=4e-6)
    assert scaled.text_encoder.lr == pytest.approx(4e-7)


def test_zero_means_zero() -> None:
    both = merged({"base": {"lr": 0, "weight_decay": 0}, "text_encoder_overrides": {"lr": 0}}, lr=1e-6)
    assert (both.unet.lr, both.text_encoder.lr) == (1e-6, 0.0)
    assert merged({"base": {"lr": 0, "weight_decay": 0}}).unet == merged({}, lr=0.0).unet.__class__(
        optimizer=None,
        lr=0.0,
        lr_scheduler="constant",
        lr_decay_steps=None,
        lr_warmup_steps=None,
        lr_cycles=3,
        lr_power=2.0,
        parameters={"weight_decay": 0.0},
    )
    assert merged({"text_encoder_lr_scale": 0}).text_encoder.lr == 0


def test_scale_lr_applies_once_to_every_part_and_is_said() -> None:
    plain, scaled = merged(OLD_FILE, images=12), merged(OLD_FILE, images=12, scale_lr=True)
    for name in ("unet", "text_encoder"):
        assert getattr(scaled, name).lr == pytest.approx(getattr(plain, name).lr * 12**0.55)
    assert scaled.notes[0] == (
        "scale_lr: times 12^0.55 = 3.922, so lr 7.845e-06 for the unet and 1.961e-06 for the text encoder"
    )


def test_a_rate_for_an_optimizer_without_one_is_said_to_do_nothing() -> None:
    assert merged({"base": {"optimizer": "adacoor"}}, lr=1.0).notes == (
        "unet: lr has no effect: adacoor takes none",
        "text encoder: lr has no effect: adacoor takes none",
    )
    assert merged({"base": {"optimizer": "adacoor"}}).notes == ()


@pytest.mark.parametrize("optimizer", ["dadapt_adam", "dadapt_lion", "dadapt_sgd", "dadapt_adan", "prodigy"])
def test_a_left_over_rate_is_warned_about(optimizer: str) -> None:
    notes = merged({"base": {"optimizer": optimizer, "lr": 1e-6}}).notes
    assert [note.split(":")[0] for note in notes] == ["unet", "text encoder"]
    assert not merged({"base": {"optimizer": optimizer, "lr": 1.0}}).notes
    assert not merged({"base": {"optimizer": "adamw", "lr": 1e-6}}).notes
