"""A long run of tiny updates, stopped and resumed again and again in one process: nothing may pile up in it."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import training.loop
from tests.faults.starts import PROJECT
from tests.jobs import World, make_world, run_job
from training.session import Session
from utils.findlast import find_last

LOOKS = 200
"""How often the process is looked at during the whole soak."""
ONE_OF_EACH = 2
"""Jobs that are taken for the start, without and with a worker process; what they hold is what is needed."""


@dataclass
class SoakFigures:
    """What grew; memory in MiB, medians.

    Args:
        jobs: calls of train.main in this one process; all but the first went on from the one before.
        early_mib, middle_mib, late_mib: in the first two jobs, in two in the middle, in the last two.
        more_files, more_threads, more_children: than in the first two jobs, at any later look, compared between jobs
            with as many workers.
    """

    updates: int = 0
    jobs: int = 0
    early_mib: float = 0.0
    middle_mib: float = 0.0
    late_mib: float = 0.0
    more_files: int = 0
    more_threads: int = 0
    more_children: int = 0


@dataclass
class _Look:
    job: int
    mib: float
    files: int
    threads: int
    children: int


@dataclass
class _Soak:
    """Stops each job after its share of the updates and writes down what the process holds."""

    updates: int
    resumes: int
    job: int = 0
    looks: list[_Look] = field(default_factory=list)

    def after_update(self, session: Session) -> None:
        update = session.progress.update
        if update % -(-self.updates // (self.resumes + 1)) == 0:
            session.stop.request()
        # A save under way has a thread and open files of its own; the looks come where there is none.
        if update % max(1, self.updates // LOOKS) == 0:
            session.writer._join()
            self.looks.append(look(self.job))


def make_soak_world(folder: Path) -> World:
    """A world whose epochs are long enough for a soak."""
    world = make_world(folder)
    (world.pictures / "multiply.txt").write_text("50", encoding="utf-8")
    return world


def look(job: int) -> _Look:
    """What this process holds just now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return _Look(
        job,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208  pathlib would open more of them
        threading.active_count(),
        len(multiprocessing.active_children()),
    )


def soak(world: World, folder: Path, updates: int, resumes: int) -> SoakFigures:
    """Train `updates` updates of one image each in `resumes` + 1 jobs, with everything on that runs beside them."""
    validation = folder / "validation.json"
    validation.write_text(json.dumps({"auto_split_proportion": 0.3}), encoding="utf-8")
    watched = _Soak(updates, resumes)
    original = training.loop.after_update

    def after(session: Session) -> None:
        original(session)
        watched.after_update(session)

    training.loop.after_update = after
    figures, code = SoakFigures(), 130
    try:
        while code == 130:
            watched.job = figures.jobs
            code = _job(world, folder, validation, watched)
            figures.jobs += 1
    finally:
        training.loop.after_update = original
    assert code == 0, code
    found = find_last(folder / "logs", PROJECT)
    assert found is not None
    assert found.finished
    figures.updates = found.progress.update
    return _grown(figures, watched.looks)


def _job(world: World, folder: Path, validation: Path, watched: _Soak) -> int:
    options: dict[str, Any] = {
        "project_name": PROJECT,
        "validation_config": validation,
        "batch_size": 1,
        "grad_accum": 1,
        "max_epochs": watched.updates,
        "max_steps": watched.updates,
        "log_step": 10,
        "sample_steps": max(2, watched.updates // 100),
        "ckpt_every_n_minutes": 0.2,
        "keep_last_n": 3,
        "ema_decay_rate": 0.99,
        "ema_update_interval": 5,
        "num_workers": watched.job % ONE_OF_EACH,
        "no_save_ckpt": False,
        "save_ckpt_dir": folder / "files",
    }
    return run_job(world, folder / "logs", **options | ({"resume_ckpt": "findlast"} if watched.job else {}))


def _grown(figures: SoakFigures, looks: list[_Look]) -> SoakFigures:
    def of(first: int) -> list[_Look]:
        return [each for each in looks if first <= each.job < first + ONE_OF_EACH]

    figures.early_mib = _median(of(0))
    figures.middle_mib = _median(of(figures.jobs // 2))
    figures.late_mib = _median(of(figures.jobs - ONE_OF_EACH))
    for what in ("files", "threads", "children"):
        for kind in range(ONE_OF_EACH):
            needed = [getattr(each, what) for each in of(0) if each.job == kind]
            held = [getattr(each, what) for each in looks if each.job % ONE_OF_EACH == kind]
            more = max(held) - max(needed) if needed else 0
            setattr(figures, f"more_{what}", max(getattr(figures, f"more_{what}"), more))
    return figures


def _median(looks: list[_Look]) -> float:
    values = sorted(each.mib for each in looks)
    return round(values[len(values) // 2], 1)
