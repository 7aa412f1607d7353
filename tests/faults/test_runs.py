"""Whole jobs killed and stopped at random moments, and resumed: the weights are those of a job left alone."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("forks, kills and signals Linux processes", allow_module_level=True)

from tests.faults import runs, starts
from tests.faults.soak import make_soak_world, soak
from tests.jobs import make_world


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[starts.Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    # A checkpoint after each update, and one of the average beside it.
    options = {"ckpt_every_n_minutes": 0, "ema_decay_rate": 0.9, "ema_update_interval": 1}
    with starts.jobs(folder, make_world(folder / "world"), **options) as jobs:
        yield jobs


@dataclass
class Whole:
    """What a job that is left alone arrives at, and how long it takes."""

    state: Any
    logdir: Path
    seconds: float


@pytest.fixture(scope="module")
def whole(jobs: starts.Jobs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    logdir = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    assert jobs.run(logdir).code == 0, jobs.output
    return Whole(runs.final_state(logdir), logdir, time.monotonic() - started)


def promised(figures: runs.RunFigures) -> None:
    assert figures.hits > 0
    bad = (figures.unusable, figures.lost, figures.unequal, figures.orphans, figures.wrong_code)
    assert (*bad, figures.astray) == (0, 0, 0, 0, 0, 0), figures


def test_kill_9_at_random_moments(jobs: starts.Jobs, whole: Whole, tmp_path: Path) -> None:
    promised(runs.kill_until_done(jobs, tmp_path, whole.state, kills=2, seed=1, seconds=whole.seconds))


def test_killed_workers_cost_time_only(jobs: starts.Jobs, whole: Whole, tmp_path: Path) -> None:
    promised(runs.kill_workers(jobs, tmp_path, whole.state, 1, seed=2, seconds=whole.seconds / 2))


def test_a_full_disk_ends_no_job(jobs: starts.Jobs, whole: Whole, tmp_path: Path) -> None:
    figures = runs.full_disks(jobs, tmp_path, whole.state, whole.logdir, count=1)
    assert figures == runs.FullFigures(jobs=1, codes={75: 1})


@pytest.mark.parametrize(
    ("place", "number", "times"),
    [
        ("while scanning", signal.SIGTERM, 1),
        ("while sampling", signal.SIGINT, 1),
        ("in mid-update", signal.SIGTERM, 2),
        ("in mid-save", signal.SIGINT, 2),
    ],
)
def test_signals(jobs: starts.Jobs, whole: Whole, tmp_path: Path, place: str, number: int, times: int) -> None:
    promised(runs.stop_at_place(jobs, tmp_path, whole.state, 1, place, (number,), times))


def test_broken_logs_samples_and_streams_end_no_job(jobs: starts.Jobs, whole: Whole, tmp_path: Path) -> None:
    figures = runs.broken_sinks(jobs, tmp_path, whole.state, 1)
    assert figures == runs.RunFigures(chains=1, codes={0: 1})


@pytest.mark.slow
def test_a_soak(tmp_path: Path) -> None:
    """A short one; `make faults` has the long one, and memory is for that to tell."""
    figures = soak(make_soak_world(tmp_path / "world"), tmp_path, updates=120, resumes=3)
    assert (figures.updates, figures.jobs) == (120, 4)
    assert (figures.more_files, figures.more_threads, figures.more_children) == (0, 0, 0), figures


def test_tokens_of_the_environment_are_written_nowhere(jobs: starts.Jobs, tmp_path: Path) -> None:
    assert jobs.run(tmp_path / "logs", save_ckpt_dir=tmp_path, max_epochs=1).code == 0, jobs.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" and path.parent == tmp_path for path in files)
    contents = [jobs.output.encode(), *(path.read_bytes() for path in files)]
    for token in starts.TOKENS.values():
        assert not any(token.encode() in content for content in contents)
