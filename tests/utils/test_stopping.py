"""Signals only set a flag; a second Ctrl-C ends everything; workers are deaf."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.stopping import ECHO_SECONDS, StopSignal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")

ROOT = Path(__file__).parent.parent.parent
JOB = """
import multiprocessing, os, sys, time
from utils.stopping import StopSignal, begin_worker, workers_start

def work(slow_start, parent):
    time.sleep(slow_start)
    begin_worker(parent)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with StopSignal() as stop:
        with workers_start(sys.argv[1]):
            given = float(sys.argv[2]), os.getpid()
            workers = [context.Process(target=work, args=given, daemon=True) for _ in range(2)]
            for worker in workers:
                worker.start()
        print("ready", *(worker.pid for worker in workers), flush=True)
        while not stop:
            time.sleep(0.01)
        print("stopping", stop.requested, flush=True)
        if sys.argv[3] == "linger":
            time.sleep(60)
        time.sleep(0.3)
        print("alive", all(worker.is_alive() for worker in workers), flush=True)
        for worker in workers:
            worker.kill()
        sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "terminated", 143),
        (signal.SIGHUP, "terminated", 143),
    ],
)
def test_the_first_signal_sets_a_flag_and_handlers_come_back(number: int, reason: str, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop
        assert stop.exit_code is None
        os.kill(os.getpid(), number)
        assert stop
        assert stop.requested == reason
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_twice_and_an_echoed_ctrl_c_still_wait_for_the_save() -> None:
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.requested == "terminated", "the first reason stands"


def test_a_request_works_without_signals_also_in_a_thread() -> None:
    seen: list[int | None] = []

    def body() -> None:
        with StopSignal() as stop:
            stop.request()
            stop.request("terminated")
            seen.append(stop.exit_code)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [130]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A file, because spawned workers import the program they belong to."""
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def start(
    script: Path, context: str, slow_start: float = 0.0, after: str = "stop"
) -> tuple[subprocess.Popen[str], list[int]]:
    job = subprocess.Popen(
        [sys.executable, str(script), context, str(slow_start), after],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        start_new_session=True,
    )
    assert job.stdout is not None
    workers = [int(pid) for pid in job.stdout.readline().split()[1:]]
    assert len(workers) == 2
    return job, workers


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_finds_workers_deaf_from_birth(script: Path, context: str, number: int) -> None:
    # The signal comes while the workers have not yet reached begin_worker.
    job, workers = start(script, context, slow_start=0.2)
    os.killpg(job.pid, number)
    output, _ = job.communicate(timeout=30)
    assert "alive True" in output
    assert job.returncode == (130 if number == signal.SIGINT else 143)
    assert all(map(gone, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loader's own watch ends workers between batches")
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("slow_start", [0.0, 1.0])
def test_workers_end_with_a_process_that_is_killed(script: Path, context: str, slow_start: float) -> None:
    """Busy ones, and those that have hardly begun when it is."""
    job, workers = start(script, context, slow_start=slow_start)
    # Spawned ones have a program to import.
    time.sleep(3.0 if context == "spawn" and not slow_start else 0.3)
    assert not any(gone(pid, seconds=0.01) for pid in workers)
    job.kill()
    job.communicate(timeout=30)
    assert all(map(gone, workers))


def test_a_second_ctrl_c_ends_the_process_and_its_workers_at_once(script: Path) -> None:
    job, workers = start(script, "fork", after="linger")
    os.killpg(job.pid, signal.SIGINT)
    assert job.stdout is not None
    assert job.stdout.readline() == "stopping interrupted\n"
    time.sleep(ECHO_SECONDS + 0.1)
    started = time.monotonic()
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=10) == 130
    assert time.monotonic() - started < 2
    assert all(map(gone, workers))
    job.stdout.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_with_nothing_to_save_the_first_signal_ends_the_process(number: int, code: int) -> None:
    body = (
        "import time\n"
        "from utils.stopping import StopSignal\n"
        "with StopSignal(at_once=True):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", body], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(number)
    _, told = job.communicate(timeout=30)
    assert job.returncode == code
    assert "nothing to save" in told
