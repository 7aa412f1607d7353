"""Whole jobs killed and stopped at random moments, and resumed: the weights are those of a job left alone."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("forks, kills and signals Linux processes", allow_module_level=True)

from tests.faults import runs
from tests.jobs import make_world


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runs.Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    # Four updates, a checkpoint after each.
    with runs.jobs(folder, make_world(folder / "world"), max_epochs=2, ckpt_every_n_minutes=0, sample_steps=2) as jobs:
        yield jobs


@pytest.fixture(scope="module")
def expected(jobs: runs.Jobs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    logdir = tmp_path_factory.mktemp("expected")
    assert jobs.run(logdir).code == 0, jobs.output
    return runs.final_state(logdir)


def promised(figures: runs.RunFigures) -> None:
    assert figures.hits > 0
    bad = (figures.unusable, figures.lost, figures.unequal, figures.orphans, figures.wrong_code)
    assert bad == (0, 0, 0, 0, 0), figures


def test_kill_9_at_random_moments(jobs: runs.Jobs, expected: Any, tmp_path: Path) -> None:
    promised(runs.kill_until_done(jobs, tmp_path, expected, kills=2, seed=1, seconds=4.0))


def test_sigterm_to_the_group_at_a_random_moment(jobs: runs.Jobs, expected: Any, tmp_path: Path) -> None:
    promised(runs.stop_until_done(jobs, tmp_path, expected, 1, 3, 4.0, "SIGTERM to the group"))


def test_ctrl_c_twice(jobs: runs.Jobs, expected: Any, tmp_path: Path) -> None:
    promised(runs.stop_until_done(jobs, tmp_path, expected, 1, 1, 4.0, "SIGINT twice"))


def test_ctrl_c_in_mid_save(jobs: runs.Jobs, expected: Any, tmp_path: Path) -> None:
    promised(runs.stop_at_place(jobs, tmp_path, expected, 1, "in mid-save", signal.SIGINT, True))
