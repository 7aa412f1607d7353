"""A stopped and resumed run is the uninterrupted one, and what only looks on does not change it: bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.assembly
from tests.jobs import World, final_state, make_world, run_folder, run_job, stop_after
from utils.checkpoint import list_checkpoints
from utils.models import load_models
from utils.tree import same_tree

# Two updates an epoch (7 pictures, 4 to an update), so odd numbers stop in mid-epoch.
UPDATES = 6
RICH: dict[str, Any] = {"ema_decay_rate": 0.9, "ema_update_interval": 1, "clip_grad_norm": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    logdir = tmp_path_factory.mktemp("uninterrupted")
    assert run_job(world, logdir, **RICH) == 0
    state = final_state(logdir)
    start = load_models(world.model)
    assert not same_tree(state["networks"]["unet"], dict(start.unet.state_dict())), "the run must have trained"
    return state


def resume(world: World, logdir: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    stop_after(monkeypatch, None)
    assert run_job(world, logdir, resume_ckpt="findlast", **options) == 0
    return final_state(logdir)


@pytest.mark.parametrize(("update", "workers"), [*((u, 0) for u in range(1, UPDATES)), (3, 1), (3, 2), (4, 2)])
def test_resumed_is_uninterrupted(
    world: World,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: int,
    workers: int,
) -> None:
    stop_after(monkeypatch, update)
    assert run_job(world, tmp_path, num_workers=workers, **RICH) == 130
    (saved,) = [c for c in list_checkpoints(run_folder(tmp_path) / "ckpts") if not c.record.ema]
    assert saved.record.progress.update == update
    assert saved.folder.name.startswith("interrupted-")
    assert " to go\n" not in capsys.readouterr().out, "a new run has no pace yet"
    assert same_tree(resume(world, tmp_path, monkeypatch, num_workers=workers, **RICH), uninterrupted)
    assert " to go\n" in capsys.readouterr().out


def test_a_chain_of_stops_is_uninterrupted(
    world: World, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1)
    assert run_job(world, tmp_path, **RICH) == 130
    for update in (2, 5):
        stop_after(monkeypatch, update)
        assert run_job(world, tmp_path, resume_ckpt="findlast", **RICH) == 130
    assert same_tree(resume(world, tmp_path, monkeypatch, **RICH), uninterrupted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_exactly(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options = {**RICH, "amp_dtype": precision}
    assert run_job(world, tmp_path / "whole", **options) == 0
    stop_after(monkeypatch, 3)
    assert run_job(world, tmp_path / "cut", **options) == 130
    whole = final_state(tmp_path / "whole")
    assert (whole["updater"]["loss_scale"] is not None) == (precision == "fp16")
    assert same_tree(resume(world, tmp_path / "cut", monkeypatch, **options), whole)


def _start_network(name: str) -> Callable[[dict[str, Any], World], None]:
    def change(state: dict[str, Any], world: World) -> None:
        state["networks"][name] = dict(getattr(load_models(world.model), name).state_dict())

    return change


def _zero_moments(part: str, moment: str) -> Callable[[dict[str, Any], World], None]:
    def change(state: dict[str, Any], world: World) -> None:
        assert _zeroed(state["updater"]["parts"][part], moment) > 0

    return change


def _zeroed(tree: Any, moment: str) -> int:
    """Set every tensor under the key `moment` to zero, wherever it is; how many there were."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    count = 0
    for key, value in list(children):
        if key == moment and isinstance(value, torch.Tensor):
            value.zero_()
            count += 1
        else:
            count += _zeroed(value, moment)
    return count


def _start_average(state: dict[str, Any], world: World) -> None:
    start = dict(load_models(world.model).unet.state_dict())
    state["ema"]["unet"] = {name: start[name] for name in state["ema"]["unet"]}


LEFT_OUT: dict[str, Callable[[dict[str, Any], World], None]] = {
    "unet": _start_network("unet"),
    "text_encoder": _start_network("text_encoder"),
    "ema": _start_average,
    **{
        f"{part} {moment}": _zero_moments(part, moment)
        for part in ("unet", "text_encoder")
        for moment in ("exp_avg", "exp_avg_sq", "step")
    },
}


@pytest.mark.parametrize("item", sorted(LEFT_OUT))
def test_leaving_an_item_out_of_the_state_is_noticed(
    world: World, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    stop_after(monkeypatch, 3)
    assert run_job(world, tmp_path, **RICH) == 130
    original = training.assembly.load_training_state

    def without(folder: Path, *, verify: bool = True) -> Any:
        state = copy.deepcopy(original(folder, verify=verify))
        LEFT_OUT[item](state, world)
        return state

    monkeypatch.setattr(training.assembly, "load_training_state", without)
    assert not same_tree(resume(world, tmp_path, monkeypatch, **RICH), uninterrupted)


@pytest.mark.parametrize("count", ["update", "epoch", "update_in_epoch"])
def test_leaving_a_count_out_of_the_progress_is_noticed(
    world: World, uninterrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    stop_after(monkeypatch, 3)
    assert run_job(world, tmp_path, **RICH) == 130
    original = training.assembly._assemble

    def without(*arguments: Any) -> Any:
        *others, progress = arguments
        return original(*others, dataclasses.replace(progress, **{count: 0}))  # type: ignore[call-arg]

    monkeypatch.setattr(training.assembly, "_assemble", without)
    assert not same_tree(resume(world, tmp_path, monkeypatch, **RICH), uninterrupted)


LOOKING_ON: dict[str, dict[str, Any]] = {
    "samples at every update": {"sample_steps": 1},
    "no samples": {"sample_prompts": None},
    "a checkpoint at every update": {"ckpt_every_n_minutes": 0},
    "a checkpoint at every epoch, with single files": {"save_every_n_epochs": 1, "no_save_ckpt": False},
    "logs at every update": {"log_step": 1},
    "no logs": {"log_step": 1000},
    "one worker": {"num_workers": 1},
    "two workers, spawned": {"num_workers": 2, "worker_start": "spawn"},
    "two workers, forked": {"num_workers": 2, "worker_start": "fork"},
    "both kinds of samples": {"sample_steps": 2, "ema_sample_nonema_model": True, "ema_sample_ema_model": True},
}


@pytest.mark.parametrize("what", sorted(LOOKING_ON))
def test_what_only_looks_on_changes_nothing(
    world: World, uninterrupted: dict[str, Any], tmp_path: Path, what: str
) -> None:
    options = {**RICH, **LOOKING_ON[what], "save_ckpt_dir": tmp_path / "files"}
    assert run_job(world, tmp_path / "logs", **options) == 0
    assert same_tree(final_state(tmp_path / "logs"), uninterrupted)


def test_training_with_and_without_an_average_is_the_same(
    world: World, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    assert run_job(world, tmp_path, clip_grad_norm=0.5) == 0
    state = final_state(tmp_path)
    assert state["ema"] is None
    assert same_tree(state["networks"], uninterrupted["networks"])
    assert same_tree(state["updater"], uninterrupted["updater"])


def test_another_seed_is_another_run(world: World, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    assert run_job(world, tmp_path, seed=556, **RICH) == 0
    assert not same_tree(final_state(tmp_path)["networks"], uninterrupted["networks"])


@pytest.mark.parametrize(
    "changed", [{"batch_size": 1}, {"seed": 7}, {"resolution": 128}, {"disable_unet_training": True}]
)
def test_a_change_that_would_mean_another_run_is_refused(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
) -> None:
    stop_after(monkeypatch, 2)
    assert run_job(world, tmp_path) == 130
    stop_after(monkeypatch, None)
    assert run_job(world, tmp_path, resume_ckpt="findlast", **changed) == 2
    told = capsys.readouterr().err
    assert next(iter(changed)) in told
    assert "--resume_mode weights" in told


def test_a_change_of_the_pictures_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    pictures = shutil.copytree(world.pictures, tmp_path / "pictures")
    stop_after(monkeypatch, 2)
    assert run_job(world, tmp_path / "logs", data_root=pictures) == 130
    stop_after(monkeypatch, None)
    caption = sorted(pictures.glob("*.txt"))[0]
    caption.write_text("something else", encoding="utf-8")
    assert run_job(world, tmp_path / "logs", data_root=pictures, resume_ckpt="findlast") == 2
    assert "the pictures or their captions" in capsys.readouterr().err


def test_a_finished_run_hands_its_weights_to_a_new_one(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(world, tmp_path, max_epochs=1) == 0
    assert run_job(world, tmp_path, max_epochs=1, resume_ckpt="findlast") == 0
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 2
    second = list_checkpoints(folders[1] / "ckpts")[0]
    assert second.record.progress.update == 2
    assert run_job(world, tmp_path, max_epochs=1, resume_ckpt="findlast", resume_mode="exact") == 2
    assert "finished" in capsys.readouterr().err
