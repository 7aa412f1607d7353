"""Pictures that take the worker with them that reads them, and machines on which no worker lives long."""

from __future__ import annotations

import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import data.workers
import training.parts
from data.batches import Batch, BatchSource, Lost, Request
from data.culprits import find_culprits
from data.item import Visit
from data.workers import Batches
from tests.jobs import World, final_state, run_folder, run_job, watch
from training.session import Session
from utils.stopping import StopSignal
from utils.tree import same_tree

OPTIONS: dict[str, Any] = {"sample_prompts": "none", "max_epochs": 2, "num_workers": 2}


@pytest.fixture
def pictures(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.pictures, tmp_path / "pictures"))


def culprit(pictures: Path) -> Path:
    return sorted(pictures.glob("*.jpg"))[0]


def opens_culprit(source: BatchSource, visit: Visit) -> bool:
    return visit.item.path == str(culprit(Path(source.options.data_root))) and visit.item.id not in source.dangerous


class Deadly(BatchSource):
    """One picture ends the process that reads it, as a decoder with a fault does."""

    def pixels(self, visit: Visit) -> torch.Tensor:
        if opens_culprit(self, visit):
            os._exit(9)
        return super().pixels(visit)


class Endless(BatchSource):
    """One picture is never read to its end."""

    def pixels(self, visit: Visit) -> torch.Tensor:
        if opens_culprit(self, visit):
            time.sleep(3600)
        return super().pixels(visit)


@pytest.mark.parametrize("source", [Deadly, Endless])
def test_a_picture_that_takes_its_reader_along_is_replaced_as_a_broken_one_is(
    world: World,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: type[BatchSource],
) -> None:
    monkeypatch.setattr(training.parts, "BatchSource", source)
    monkeypatch.setattr(training.parts, "Batches", partial(Batches, patience_seconds=2.0))
    monkeypatch.setattr(data.workers, "LOOK_SECONDS", 0.2)
    assert run_job(world, tmp_path / "logs", data_root=pictures, **OPTIONS) == 0
    shown = capsys.readouterr().out
    told = [line for line in shown.splitlines() if "another picture of its size is trained in its place" in line]
    assert len(told) == 2, "once an epoch"
    assert all(culprit(pictures).name in line for line in told)
    assert all(("exit code 9" if source is Deadly else "more than 2 seconds") in line for line in told)
    monkeypatch.undo()
    culprit(pictures).write_bytes(culprit(pictures).read_bytes()[:5000])
    assert run_job(world, tmp_path / "broken", data_root=pictures, **OPTIONS) == 0
    assert same_tree(final_state(tmp_path / "logs"), final_state(tmp_path / "broken"))


def test_a_stop_does_not_wait_for_the_search(
    world: World,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture may take a minute there; and what was only stopped is not to blame."""
    found: list[dict[str, str]] = []

    def search(*arguments: Any, stop: StopSignal, seconds: float, **keywords: Any) -> dict[str, str]:
        threading.Timer(1.0, stop.request).start()
        found.append(find_culprits(*arguments, stop=stop, seconds=3600.0, **keywords))
        return found[0]

    monkeypatch.setattr(training.parts, "BatchSource", Endless)
    monkeypatch.setattr(training.parts, "Batches", partial(Batches, patience_seconds=1.0))
    monkeypatch.setattr(data.workers, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(data.workers, "STOP_PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(data.workers, "find_culprits", search)
    assert run_job(world, tmp_path / "logs", data_root=pictures, **OPTIONS) == 130
    assert found == [{}]


class Doomed(BatchSource):
    """No picture can be read once there is a file `.doom` beside them: the machine has no memory left, say."""

    def pixels(self, visit: Visit) -> torch.Tensor:
        if (Path(self.options.data_root) / ".doom").exists():
            os._exit(9)
        return super().pixels(visit)


def test_a_machine_that_kills_every_worker_ends_the_run_in_words_and_loses_nothing(
    world: World,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def doom(session: Session) -> None:
        if session.progress.update == 1 and not done.exists():
            (pictures / ".doom").touch()
            done.touch()

    done = tmp_path / "done"
    assert run_job(world, tmp_path / "calm", data_root=pictures, **OPTIONS) == 0
    monkeypatch.setattr(training.parts, "BatchSource", Doomed)
    watch(monkeypatch, doom)
    assert run_job(world, tmp_path / "logs", data_root=pictures, **OPTIONS) == 75
    told = capsys.readouterr()
    assert "4 times in a row workers died or brought nothing" in told.err
    assert "num_workers" in told.err
    assert "in its place" not in told.out, "no picture is to blame"
    (saved,) = (run_folder(tmp_path / "logs") / "ckpts").iterdir()
    assert saved.name.startswith("interrupted-")
    (pictures / ".doom").unlink()
    assert run_job(world, tmp_path / "logs", data_root=pictures, resume_ckpt="findlast", **OPTIONS) == 0
    assert same_tree(final_state(tmp_path / "logs"), final_state(tmp_path / "calm"))


class Faulty(BatchSource):
    """A fault of ours."""

    def __getitem__(self, request: Request) -> Batch | Lost:  # type: ignore[override]
        raise RuntimeError("a fault")


def test_a_fault_of_the_program_is_told_as_it_was_raised(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.parts, "BatchSource", Faulty)
    with pytest.raises(RuntimeError, match=r"(?s)in DataLoader worker process.*in __getitem__.*a fault"):
        run_job(world, tmp_path, **OPTIONS)
