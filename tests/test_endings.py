"""How runs end, and what the next start makes of it: cut off at the very end, out of memory, in mid-sample."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import training.between
import training.loop
import training.rehearsal
from data.batches import Batch
from optimizer.update import Updater
from tests.jobs import World, final_state, make_world, run_folder, run_job
from training.session import Session
from utils.device import Device
from utils.gallery import Gallery
from utils.tree import same_tree

QUICK: dict[str, Any] = {"sample_prompts": "none", "max_steps": 2}
AVERAGED: dict[str, Any] = {**QUICK, "no_save_ckpt": False, "ema_decay_rate": 0.9, "ema_update_interval": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the logs and single files of a run that was left alone."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_job(world, folder / "logs", save_ckpt_dir=folder / "files", **AVERAGED) == 0
    return folder


def again(world: World, folder: Path, **options: Any) -> int:
    given = {**AVERAGED, "save_ckpt_dir": folder / "files", "resume_ckpt": "findlast", **options}
    return run_job(world, folder / "logs", **given)


def cut_off(finished: Path, folder: Path, *lacking: str) -> tuple[Path, list[Path]]:
    """A copy of the finished run in `folder`, cut off before the end of its end; its run folder, its single files."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    run = run_folder(folder / "logs")
    (run / "finished.json").unlink()
    single_files = sorted((folder / "files").iterdir())
    for each in lacking:
        (found,) = [path for path in [*single_files, *(run / "ckpts").iterdir()] if path.name == each]
        found.unlink() if found.is_file() else shutil.rmtree(found)
    return run, single_files


def names(finished: Path) -> tuple[str, str]:
    """The checkpoints of the finished run: plain and averaged."""
    plain, average = sorted(path.name for path in (run_folder(finished / "logs") / "ckpts").iterdir())
    return plain, average


def test_what_a_finished_run_lacks_is_written_by_findlast(world: World, finished: Path, tmp_path: Path) -> None:
    plain, average = names(finished)
    lacking = (f"{plain}.safetensors", f"{average}.safetensors", average)
    run, single_files = cut_off(finished, tmp_path, *lacking)
    assert again(world, tmp_path, resume_mode="exact") == 0
    assert run_folder(tmp_path / "logs") == run, "no new run was begun"
    assert json.loads((run / "finished.json").read_text()) == {"checkpoint": plain, "updates": 2}
    for path in single_files:
        assert same_tree(load_file(path), load_file(finished / "files" / path.name))
        assert _metadata(path) == _metadata(finished / "files" / path.name)
    weights = Path("ckpts", average, "unet", "diffusion_pytorch_model.safetensors")
    assert (run / weights).read_bytes() == (run_folder(finished / "logs") / weights).read_bytes()


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return {name: value for name, value in found.items() if name != "modelspec.date"}


def test_a_run_that_lacks_nothing_but_the_note_trains_nothing(world: World, finished: Path, tmp_path: Path) -> None:
    run, single_files = cut_off(finished, tmp_path)
    before = [path.stat().st_mtime_ns for path in single_files]
    assert again(world, tmp_path, max_steps=9) == 0
    assert [path.stat().st_mtime_ns for path in single_files] == before
    assert (run / "finished.json").exists()
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert again(world, tmp_path) == 0
    assert len(list((tmp_path / "logs").iterdir())) == 2, "and now its weights start a new run"


def test_weights_can_be_had_of_a_run_that_was_cut_off(world: World, finished: Path, tmp_path: Path) -> None:
    cut_off(finished, tmp_path)
    assert again(world, tmp_path, resume_mode="weights", max_steps=1) == 0
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_a_last_file_that_cannot_be_written_is_tried_by_the_next_start(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").write_text("in the way")
    options = {**QUICK, "no_save_ckpt": False, "save_ckpt_dir": tmp_path / "files"}
    assert run_job(world, tmp_path / "logs", **options) == 75
    shown = capsys.readouterr().out
    assert "saves will fail there" in shown, "foreseen at the start"
    assert "findlast writes the rest" in shown
    assert run_job(world, tmp_path / "logs", **options, resume_ckpt="findlast") == 75
    (tmp_path / "files").unlink()
    assert run_job(world, tmp_path / "logs", **options, resume_ckpt="findlast") == 0
    assert len(list((tmp_path / "files").iterdir())) == 1
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_memory_that_ends_in_the_step_is_told_in_words(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Updater.step

    def short(updater: Updater, done: int) -> Any:
        if done == 1:
            raise torch.OutOfMemoryError("no room for moments\nand much more")
        return original(updater, done)

    monkeypatch.setattr(Updater, "step", short)
    assert run_job(world, tmp_path, **QUICK) == 3
    told = capsys.readouterr().err
    assert "(no room for moments)" in told
    assert "gradient_checkpointing" in told
    (saved,) = (run_folder(tmp_path) / "ckpts").iterdir()
    assert saved.name.startswith("errored-"), "weights may have stepped in part"


def test_workers_that_fail_while_stopping_are_the_stop(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training.loop.take

    def broken(session: Session, batches: Iterator[Batch]) -> Batch:
        if session.progress.update < 1:
            return original(session, batches)
        session.stop.request("terminated")
        # The first micro-batch of the update is there, the second will never come.
        failing = (next(batches) if number == 0 else _lost() for number in range(2))
        monkeypatch.setattr(training.loop, "take", lambda session, _: original(session, failing))
        return original(session, failing)

    monkeypatch.setattr(training.loop, "take", broken)
    assert run_job(world, tmp_path / "cut", sample_prompts="none", max_epochs=1) == 143
    assert "for no more batches come: the workers are gone" in capsys.readouterr().out
    (saved,) = (run_folder(tmp_path / "cut") / "ckpts").iterdir()
    assert saved.name == "interrupted-job-ep00-gs00001"
    monkeypatch.setattr(training.loop, "take", original)
    assert run_job(world, tmp_path / "cut", sample_prompts="none", max_epochs=1, resume_ckpt="findlast") == 0
    assert run_job(world, tmp_path / "whole", sample_prompts="none", max_epochs=1) == 0
    assert same_tree(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def _lost() -> Batch:
    raise RuntimeError("the workers are gone")


def test_a_stop_leaves_samples_and_validation_to_the_next_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = tmp_path / "validation.json"
    values = {"auto_split_proportion": 0.3, "every_n_epochs": 0.5, "use_relative_loss": True}
    validation.write_text(json.dumps(values), encoding="utf-8")
    options = {"max_epochs": 1, "sample_steps": 1, "grad_accum": 1, "validation_config": validation}
    assert run_job(world, tmp_path / "whole", **options) == 0
    sessions = stop_inside(monkeypatch, {1: "samples", 2: "validation"})
    assert run_job(world, tmp_path / "cut", **options) == 130
    assert (sessions[-1].progress.update, sessions[-1].cut_off) == (1, {"samples"})
    run = run_folder(tmp_path / "cut")
    assert not list((run / "samples").glob("gs00001-*"))
    assert run_job(world, tmp_path / "cut", **options, resume_ckpt="findlast") == 130
    assert list((run / "samples").glob("gs00001-*.jpg"))
    assert (sessions[-1].progress.update, sessions[-1].cut_off) == (2, {"validation"})
    assert [update for update, _ in _curve(run)] == [0]
    assert run_job(world, tmp_path / "cut", **options, resume_ckpt="findlast") == 0
    assert _curve(run) == _curve(run_folder(tmp_path / "whole"))
    assert same_tree(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


@pytest.mark.parametrize("what", ["samples", "validation"])
def test_a_stop_after_the_last_update_leaves_the_rest_to_the_next_start(
    what: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = tmp_path / "validation.json"
    validation.write_text(json.dumps({"auto_split_proportion": 0.3, "use_relative_loss": True}), encoding="utf-8")
    options = {"max_epochs": 1, "max_steps": 2, "sample_steps": 1, "grad_accum": 1, "validation_config": validation}
    assert run_job(world, tmp_path / "whole", **options) == 0
    stop_inside(monkeypatch, {2: what})
    assert run_job(world, tmp_path / "cut", **options) == 130
    run = run_folder(tmp_path / "cut")
    assert not (run / "finished.json").exists()
    assert run_job(world, tmp_path / "cut", **options, resume_ckpt="findlast") == 0
    assert list((run / "samples").glob("gs00002-*.jpg"))
    assert (run / "finished.json").exists()
    assert _curve(run) == _curve(run_folder(tmp_path / "whole"))
    assert same_tree(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def _curve(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["update"], row["validation/val relative"]) for row in rows if "validation/val relative" in row]


def stop_inside(monkeypatch: pytest.MonkeyPatch, places: dict[int, str]) -> list[Session]:
    """Ask for a stop inside what `places` names after an update, the first time; the sessions of all jobs to come."""
    sessions: list[Session] = []
    asked: set[int] = set()

    def stop(what: str) -> None:
        update = sessions[-1].progress.update
        if places.get(update) == what and update not in asked:
            asked.add(update)
            sessions[-1].stop.request()

    def inside(holder: Any, name: str, what: str) -> None:
        original = getattr(holder, name)

        def look(*arguments: Any) -> Any:
            stop(what)
            return original(*arguments)

        monkeypatch.setattr(holder, name, look)

    def remember(session: Session) -> None:
        sessions.append(session)
        original(session)

    original = training.loop.before_first_update
    monkeypatch.setattr(training.loop, "before_first_update", remember)
    inside(training.between, "losses_of_probe", "validation")
    inside(Gallery, "_sample", "samples")
    return sessions


def test_the_rehearsal_tells_what_each_bucket_a_sample_and_a_save_take(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Device, "peak_gib", lambda _: 1.5)
    original = training.loop.before_first_update

    def before(session: Session) -> None:
        training.rehearsal.rehearse(session)
        original(session)

    monkeypatch.setattr(training.loop, "before_first_update", before)
    assert run_job(world, tmp_path, max_steps=1) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("memory at the peak of an update"))
    assert line.count("2 images of") == 3, "every bucket"
    assert "2 images of 64 x 64: 1.50 GiB" in line
    assert "memory at the peak of a sample of 64 x 64: 1.50 GiB" in shown
    assert "a save copies" in shown


def test_what_will_fail_is_said_before_the_first_update(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training.loop.before_first_update

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a sample")

    def before(session: Session) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("utils.gallery.Gallery._sample", short)
            patch.setattr("training.rehearsal.available_bytes", lambda: 10.0)
            training.rehearsal.rehearse(session)
            patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20))
            training.rehearsal.foresee_saves(session)
        original(session)

    monkeypatch.setattr(training.loop, "before_first_update", before)
    assert run_job(world, tmp_path, max_steps=1, sample_steps=1000) == 0
    shown = capsys.readouterr().out
    assert "samples will fail, the training goes on without them: no room for a sample" in shown
    assert "memory does not hold a copy" in shown
    assert "has 0.00 GiB free and a save takes" in shown
