"""Run folders have names of their own, and one run at a time."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.errors import EXIT_TRY_LATER, TryLaterError
from utils.run_dir import create_run_dir, open_run_dir, project_name_problem

HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from utils.run_dir import open_run_dir

def worker():
    print("held", flush=True)
    time.sleep(60)

with open_run_dir(Path(sys.argv[1])).lock():
    if sys.argv[2] == "fork":
        multiprocessing.get_context("fork").Process(target=worker, daemon=True).start()
    else:
        print("held", flush=True)
    time.sleep(60)
"""


def test_names_and_paths(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    run = create_run_dir(tmp_path / "deep" / "logs", "my proj", now=now)
    assert run.name == "my proj-20260102-030405"
    assert run.log == run.folder / "my proj-20260102-030405.log"
    assert run.main_json.name == "my proj-20260102-030405_main.json"
    assert run.opt_json.name == "my proj-20260102-030405_opt.json"
    assert run.samples.is_dir()
    assert run.ckpts.is_dir()
    assert create_run_dir(tmp_path / "deep" / "logs", "my proj", now=now).name == "my proj-20260102-030405-2"
    assert open_run_dir(run.folder) == run


def test_forty_runs_started_at_once_get_forty_folders(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(create_run_dir(tmp_path, "p", now=now).folder)) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 40


@pytest.mark.parametrize("name", ["myproj", "Anna's".replace("'", ""), "a.b_c-d e", "übung 2", "x" * 120, "-x"])
def test_good_names(name: str, tmp_path: Path) -> None:
    assert project_name_problem(name) is None
    assert create_run_dir(tmp_path, name).folder.parent == tmp_path


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "a\n", "a\0", ".hidden", " x", "x ", "x.", "con", "NUL.txt", "x" * 121,
     "a:b", "a*", "\u202ex"],
)  # fmt: skip
def test_names_that_could_leave_the_log_folder_are_refused(name: str, tmp_path: Path) -> None:
    assert project_name_problem(name) is not None
    with pytest.raises(AssertionError):
        create_run_dir(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_kept_out_while_the_first_lives(tmp_path: Path) -> None:
    run = create_run_dir(tmp_path, "p")
    with run.lock():
        code = (
            "import sys; from pathlib import Path; from utils.run_dir import RunDir\n"
            "with RunDir(Path(sys.argv[1])).lock(patience_seconds=0.1): print('in')"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True, timeout=60
        )
        assert "in" not in second.stdout.split()
        assert "another run is at work" in second.stderr
    with run.lock(patience_seconds=0):
        pass
    assert TryLaterError.exit_code == EXIT_TRY_LATER


@pytest.mark.skipif(os.name == "nt", reason="kill -9 and fork")
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_the_lock_does_not_survive_kill_9_even_when_a_forked_worker_does(tmp_path: Path, how: str) -> None:
    run = create_run_dir(tmp_path, "p")
    arguments = [sys.executable, "-c", HOLDER, str(run.folder), how]
    # A group of its own, so that the worker that outlives its parent can be ended.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(TryLaterError), run.lock(patience_seconds=0):
                pass
            holder.kill()
            holder.wait()
            started = time.monotonic()
            with run.lock(patience_seconds=2):
                assert time.monotonic() - started < 1
        finally:
            os.killpg(holder.pid, signal.SIGKILL) if how == "fork" else holder.kill()
