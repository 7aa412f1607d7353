"""The long form of the fault tests: `python -m tests.faults [--scale 1.0] [name ...]` prints the rows of the table."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# tests/jobs.py imports its neighbours as pytest would.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from starter.make_model import random_model  # noqa: E402
from tests.faults import disk, kills, order, runs, starts  # noqa: E402
from tests.faults.calls import fail_every_call  # noqa: E402
from tests.faults.damage import damage, forge  # noqa: E402
from tests.faults.mutated import mutate  # noqa: E402
from tests.faults.soak import make_soak_world, soak  # noqa: E402
from tests.jobs import make_world  # noqa: E402

Test = Callable[[Path, int], Any]
KILLED = "kill -9 of jobs"


def saves() -> dict[str, tuple[int, Test]]:
    """The faults of saves alone: how often each, and what runs it."""
    return {
        "kill -9 during saves": (200, lambda d, n: kills.kill_during_saves(d, n, 1)),
        "kill -9 during torch.save in place": (
            200,
            lambda d, n: kills.kill_during_naive_saves(d, n, 1, kills.save_naively_with_torch),
        ),
        "kill -9 during a folder in place": (
            200,
            lambda d, n: kills.kill_during_naive_saves(d, n, 1, kills.save_naively_as_folder),
        ),
        "disk full, RLIMIT_FSIZE": (20, disk.limited_files),
        "disk full, file system": (20, _small_file_system),
        "every call of a save fails once": (1, _every_call),
        "bit flips": (1000, lambda d, n: damage(d, n, 1, search_every=20)),
        "truncations": (50, lambda d, n: damage(d, n, 1, cut=True, search_every=5)),
        "forged manifests and states": (20_000, lambda d, n: forge(d, n, 1)),
        "changed model and option files": (20_000, _mutated),
        "order on the disk": (
            1,
            lambda d, n: order.violations(*order.watched_save(d)) or "sync, manifest, rename, sync",
        ),
    }


def _small_file_system(folder: Path, count: int) -> Any:
    with disk.small_file_system(folder / "mount") as mount:
        return "no right to mount a file system here" if mount is None else disk.full_file_system(mount, count)


def _mutated(folder: Path, count: int) -> Any:
    (folder / "changed").mkdir()
    return mutate(folder / "changed", random_model(folder / "model"), count, 1)


def _every_call(folder: Path, _count: int) -> Any:
    number = itertools.count()
    return fail_every_call(lambda: folder / str(next(number)))


def whole_runs(jobs: starts.Jobs, expected: Any, whole: Path, seconds: float) -> dict[str, tuple[int, Test]]:
    """The faults of whole jobs; `seconds`: how long one takes that is left alone."""
    rare: dict[str, Any] = {"ckpt_every_n_minutes": 10, "no_save_ckpt": True}
    validating: dict[str, Any] = {**rare, "validation_config": whole / "validation.json"}

    def killed(folder: Path, count: int) -> Any:
        return runs.kill_until_done(jobs, folder, expected, count, 1, seconds)

    def stopped(how: str, folder: Path, count: int) -> Any:
        return runs.stop_until_done(jobs, folder, expected, count, 1, seconds, how)

    def placed(place: str, folder: Path, count: int) -> Any:
        numbers = (signal.SIGTERM, signal.SIGINT)
        # What is not in question may be rare.
        options: dict[str, Any] = {} if place == "in mid-save" else rare
        return runs.stop_at_place(jobs, folder, expected, count, place, numbers, **options)

    def validated(folder: Path, count: int) -> Any:
        validating["validation_config"].write_text('{"auto_split_proportion": 0.3}', encoding="utf-8")
        assert jobs.run(folder / "whole", **validating).code == 0, jobs.output
        numbers, other = (signal.SIGTERM, signal.SIGINT), runs.final_state(folder / "whole")
        return runs.stop_at_place(jobs, folder, other, count, "while validating", numbers, **validating)

    def workers(folder: Path, count: int) -> Any:
        return runs.kill_workers(jobs, folder, expected, count, 1, seconds / 2)

    tests: dict[str, tuple[int, Test]] = {KILLED: (200, killed)}
    tests |= {how: (50, partial(stopped, how)) for how in runs.GENTLE}
    for place in runs.PLACES:
        tests[f"stopped {place}"] = (50, validated if place == "while validating" else partial(placed, place))
    return tests | {
        "kill -9 of workers": (100, workers),
        "disk full under jobs": (20, lambda folder, count: runs.full_disks(jobs, folder, expected, whole, count)),
        "broken logs and streams": (10, lambda folder, count: runs.broken_sinks(jobs, folder, expected, count)),
    }


def main() -> None:
    """Run the named tests, or all of them, `scale` times as often as the table in docs/reliability.md says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; nothing: all")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", choices=["saves", "runs", "soak"], help="a part of the tests")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(1)

    def run(tests: dict[str, tuple[int, Test]]) -> None:
        for name, (count, test) in tests.items():
            if not given.names or any(part in name for part in given.names):
                with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
                    started = time.monotonic()
                    figures = _shown(test(Path(folder), max(1, round(count * given.scale))))
                    print(f"{name}: {figures} ({time.monotonic() - started:.0f} s)", flush=True)

    if given.only in (None, "saves"):
        run(saves())
    if given.only in (None, "runs"):
        with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
            run_jobs(Path(name), run)
    if given.only in (None, "soak"):
        run({"soak": (20_000, _soak)})


def run_jobs(folder: Path, run: Callable[[dict[str, tuple[int, Test]]], None]) -> None:
    """Hand `run` the faults of whole jobs, with the jobs and what one that is left alone arrives at."""
    with starts.jobs(folder, make_world(folder / "world")) as jobs:
        assert jobs.run(folder / "whole").code == 0, jobs.output
        started = time.monotonic()
        assert jobs.run(folder / "again").code == 0, jobs.output
        seconds = time.monotonic() - started
        print(f"a job that is left alone takes {seconds:.1f} s", flush=True)
        run(whole_runs(jobs, runs.final_state(folder / "whole"), folder / "whole", seconds))


def _soak(folder: Path, updates: int) -> Any:
    # What a run prints goes by the hundred lines.
    with Path(os.devnull).open("w") as null, redirect_stdout(null):
        return soak(make_soak_world(folder / "world"), folder, updates, max(2, round(updates / 1000)))


def _shown(figures: Any) -> str:
    if not dataclasses.is_dataclass(figures) or isinstance(figures, type):
        return str(figures)
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(figures).items())


if __name__ == "__main__":
    main()
