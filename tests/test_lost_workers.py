"""Workers that die or hang: the job goes on to the bits of a job that nothing happened to."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing.reductions

import data.workers
import training.parts
from data.batches import Batch, BatchSource, Lost, Request
from data.workers import Batches
from tests.jobs import World, final_state, run_job, watch
from training.session import Session
from utils.tree import same_tree

rebuild: Callable[..., Any] = torch.multiprocessing.reductions.rebuild_storage_fd
OPTIONS: dict[str, Any] = {"sample_prompts": "none", "max_epochs": 2, "num_workers": 2}
fetched: list[int] = []


@pytest.fixture(scope="module")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The final state of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_job(world, folder, **OPTIONS) == 0
    return final_state(folder)


def test_killed_workers_cost_nothing_but_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"sample_prompts": "none", "max_epochs": 4, "num_workers": 2, "batch_size": 1}
    assert run_job(world, tmp_path / "calm", **options) == 0
    monkeypatch.setattr(data.workers, "LOOK_SECONDS", 0.2)

    def kill(session: Session) -> None:
        if session.progress.update in (2, 7):
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    watch(monkeypatch, kill)
    capsys.readouterr()
    began = time.monotonic()
    assert run_job(world, tmp_path / "killed", **options) == 0
    assert time.monotonic() - began < 300, "a death is not waited out as a hang would be"
    assert "workers are started anew" in capsys.readouterr().out
    assert same_tree(final_state(tmp_path / "killed"), final_state(tmp_path / "calm"))


@pytest.fixture(params=[False, True], ids=["plain", "pinned"])
def pinned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the thread that moves batches to page-locked memory, as on CUDA; only that it moves nothing here."""
    if request.param:
        monkeypatch.setattr(training.parts, "Batches", _pinned_batches)
        monkeypatch.setattr(Batch, "pin_memory", lambda self: self)
        for name, value in (("is_available", True), ("current_device_index", 0), ("set_device_index", None)):
            monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    return bool(request.param)


def _pinned_batches(source: BatchSource, *, pin_memory: bool) -> Batches:
    assert not pin_memory
    return Batches(source, pin_memory=True)


def rebuild_from_the_dead(*args: Any) -> Any:
    """Stop one worker and kill the other when a tensor of the second batch is about to be fetched."""
    fetched.append(os.getpid())
    if len(fetched) == 7:
        stopped, killed = (child.pid for child in multiprocessing.active_children())
        assert stopped is not None
        assert killed is not None
        os.kill(stopped, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    return rebuild(*args)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="tensors travel in another way")
def test_a_worker_that_dies_before_its_batch_is_fetched(
    world: World,
    calm: Any,
    pinned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetched.clear()
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", rebuild_from_the_dead)
    assert run_job(world, tmp_path, **OPTIONS) == 0
    assert set(fetched) == {os.getpid()}
    assert not multiprocessing.active_children()
    assert "workers are started anew" in capsys.readouterr().out
    assert same_tree(final_state(tmp_path), calm)


@pytest.mark.skipif(sys.platform != "linux", reason="tensors travel in another way")
def test_workers_that_are_long_in_dying_are_not_taken_for_new_ones(
    world: World, calm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_later(process: BaseProcess) -> None:
        threading.Timer(0.1, kill, [process]).start()

    kill = BaseProcess.kill
    fetched.clear()
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", rebuild_from_the_dead)
    monkeypatch.setattr(BaseProcess, "kill", kill_later)
    assert run_job(world, tmp_path, **OPTIONS) == 0
    assert capsys.readouterr().out.count("workers are started anew") == 1
    assert same_tree(final_state(tmp_path), calm)


def queues_waited_for_at_exit() -> list[Any]:
    """What the interpreter joins at its end: threads that may never get what they have into their pipe."""
    registry = multiprocessing.util._finalizer_registry  # type: ignore[attr-defined]
    return [one for one in registry.values() if one._callback is Queue._finalize_join]  # type: ignore[attr-defined]


class HalfSent(BatchSource):
    """Dies with a part of its answer in the pipe, as soon as there is no file `.wait` beside its pictures."""

    def __getitem__(self, request: Request) -> Batch | Lost:  # type: ignore[override]
        marker = Path(self.options.data_root) / ".died"
        if request.update == 1 and not marker.exists():
            marker.touch()
            time.sleep(0.5)  # what it has answered before is gone by then

            def send_half(self: Any, message: Any) -> None:
                os.write(self.fileno(), message[: len(message) // 2])
                time.sleep(0.3)
                while marker.with_name(".wait").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

            Connection._send = send_half  # type: ignore[attr-defined]
        return super().__getitem__(request)


@pytest.mark.skipif(sys.platform == "win32", reason="messages are whole there")
def test_a_worker_that_dies_with_half_its_message_sent(
    world: World,
    calm: Any,
    pinned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures = shutil.copytree(world.pictures, tmp_path / "pictures")
    monkeypatch.setattr(training.parts, "BatchSource", HalfSent)
    assert run_job(world, tmp_path / "logs", data_root=pictures, **OPTIONS) == 0
    assert (pictures / ".died").exists()
    assert not queues_waited_for_at_exit()
    assert "workers are started anew" in capsys.readouterr().out
    assert same_tree(final_state(tmp_path / "logs"), calm)


class Slow(BatchSource):
    """Hangs at one picture, as a disk that is gone does."""

    def __getitem__(self, request: Request) -> Batch | Lost:  # type: ignore[override]
        if request.update == 1 and not (marker := Path(self.options.data_root) / ".hung").exists():
            marker.touch()
            time.sleep(3600)
        return super().__getitem__(request)


@pytest.fixture
def slow_pictures(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures, one of which lets the worker hang that reads it first."""
    monkeypatch.setattr(training.parts, "BatchSource", Slow)
    monkeypatch.setattr(data.workers, "LOOK_SECONDS", 0.2)
    return Path(shutil.copytree(world.pictures, tmp_path / "pictures"))


def test_a_worker_that_hangs_is_found_and_its_picture_named(
    world: World,
    calm: Any,
    slow_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training.parts, "Batches", partial(Batches, patience_seconds=3.0))
    assert run_job(world, tmp_path / "logs", data_root=slow_pictures, **OPTIONS) == 0
    shown = capsys.readouterr().out
    assert "workers are started anew (DataLoader timed out" in shown
    assert str(slow_pictures) in shown
    assert same_tree(final_state(tmp_path / "logs"), calm)


def ask_while_waiting(monkeypatch: pytest.MonkeyPatch, marker: Path, *, waited_for: bool = True) -> None:
    """Ask for a stop after the first update, once there is `marker`: at once, or when the next batch is waited for."""

    def ask(session: Session) -> None:
        if session.progress.update == 1 and not session.stop:
            while not marker.exists():
                time.sleep(0.01)
            threading.Timer(0.5 if waited_for else 0.0, stop, [session]).start()
            while not waited_for and not session.stop:
                time.sleep(0.01)

    def stop(session: Session) -> None:
        session.stop.request()
        marker.with_name(".wait").unlink(missing_ok=True)

    watch(monkeypatch, ask)


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_stop_does_not_wait_for_a_worker_that_hangs(
    world: World,
    calm: Any,
    slow_pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    waited_for: bool,
) -> None:
    """Neither while its batch is waited for, nor at the end, when it was only to bring the next one."""
    monkeypatch.setattr(data.workers, "STOP_PATIENCE_SECONDS", 0.6)

    ask_while_waiting(monkeypatch, slow_pictures / ".hung", waited_for=waited_for)
    began = time.monotonic()
    assert run_job(world, tmp_path / "logs", data_root=slow_pictures, **OPTIONS) == 130
    assert time.monotonic() - began < 300
    assert not multiprocessing.active_children()
    assert ("the update in hand is left" in capsys.readouterr().out) == waited_for
    monkeypatch.undo()
    assert run_job(world, tmp_path / "logs", data_root=slow_pictures, resume_ckpt="findlast", **OPTIONS) == 0
    assert same_tree(final_state(tmp_path / "logs"), calm)


@pytest.mark.parametrize("pinned", [True], indirect=True, ids=["pinned"])
@pytest.mark.skipif(sys.platform == "win32", reason="messages are whole there")
def test_a_stop_does_not_wait_for_the_rest_of_a_message(
    world: World,
    pinned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures = Path(shutil.copytree(world.pictures, tmp_path / "pictures"))
    (pictures / ".wait").touch()
    monkeypatch.setattr(training.parts, "BatchSource", HalfSent)
    ask_while_waiting(monkeypatch, pictures / ".died")
    assert run_job(world, tmp_path / "logs", data_root=pictures, **OPTIONS) == 130
    assert "the update in hand is left" in capsys.readouterr().out
    assert not queues_waited_for_at_exit()
