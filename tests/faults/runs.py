"""Whole jobs that are killed, stopped and resumed until they are done, and compared with one that was left alone."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.starts import PROJECT, Ended, Jobs, Target
from utils.checkpoint import load_training_state, prove
from utils.errors import UserError
from utils.findlast import find_last
from utils.tree import same_tree


@dataclass
class RunFigures:
    """Counts over all jobs.

    Args:
        hits: kills or signals that met a living job.
        unusable: hits after which a folder with a checkpoint's name did not prove.
        lost: hits after which a save that the log had reported was not found.
        most_lost: the most finished updates that a hit made a chain do again.
        unequal: chains whose last training state differed in any bit from the uninterrupted one.
        orphans: processes that outlived their job.
        wrong_code: jobs that ended with another exit code than they should have.
    """

    hits: int = 0
    chains: int = 0
    unusable: int = 0
    lost: int = 0
    most_lost: int = 0
    unequal: int = 0
    orphans: int = 0
    wrong_code: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    slowest_stop_seconds: float = 0.0


def final_state(logdir: Path) -> Any:
    """The training state of the finished run in `logdir`, or `None`."""
    found = find_last(logdir, PROJECT)
    return load_training_state(found.folder) if found is not None and found.finished and found.has_state else None


def inspect(logdir: Path, ended: Ended, figures: RunFigures) -> bool:
    """Count what a hit has left; whether the run is finished.

    The hit may come between the last save and the end; another job would then start a new run from the finished one.
    """
    reported = 0
    for run in logdir.iterdir() if logdir.is_dir() else []:
        for folder in (run / "ckpts").iterdir() if (run / "ckpts").is_dir() else []:
            if not folder.name.startswith("."):
                try:
                    prove(folder, from_disk=False)
                except UserError:
                    figures.unusable += 1
        reported = max([reported, *(_update(line) for log in run.glob("*.log") for line in _saved(log))])
    found = find_last(logdir, PROJECT)
    reached = 0 if found is None else found.progress.update
    figures.lost += reached < reported
    figures.most_lost = max(figures.most_lost, ended.update - reached)
    figures.orphans += ended.orphans
    assert ended.code != 0 or (found is not None and found.finished), "a job that ends well leaves a finished run"
    return found is not None and found.finished


def _saved(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if " saved " in line and "-gs" in line]


def _update(line: str) -> int:
    return int(line.rpartition("-gs")[2][:5])


def kill_until_done(jobs: Jobs, root: Path, expected: Any, kills: int, seed: int, seconds: float) -> RunFigures:
    """Chains of jobs, each killed at a random moment within `seconds` of its start, until `kills` have hit."""
    chance, figures = random.Random(seed), RunFigures()
    while figures.hits < kills:
        logdir = root / f"chain-{figures.chains:04}"
        while True:
            workers = chance.choice([0, 0, 1, 2])
            moment = chance.uniform(0.0, seconds)
            target: Target = chance.choice(["process", "group"])
            ended = jobs.run(logdir, (moment, signal.SIGKILL, target), num_workers=workers)
            figures.codes[ended.code] = figures.codes.get(ended.code, 0) + 1
            figures.hits += ended.code == -signal.SIGKILL
            figures.wrong_code += ended.code not in (0, -signal.SIGKILL)
            if inspect(logdir, ended, figures):
                break
        figures.chains += 1
        figures.unequal += not same_tree(final_state(logdir), expected)
    return figures


def kill_workers(jobs: Jobs, root: Path, expected: Any, hits: int, seed: int, seconds: float) -> RunFigures:
    """Jobs, each of which loses one worker at a random moment and goes on."""
    chance, figures = random.Random(seed), RunFigures()
    for _ in range(hits):
        logdir = root / f"chain-{figures.chains:04}"
        moments = [chance.uniform(0.0, seconds) for _ in range(2)]
        kills: list[tuple[float, int, Target]] = [(moment, signal.SIGKILL, "worker") for moment in moments]
        ended = jobs.run(logdir, *kills, num_workers=2)
        _count(ended, set(), logdir, figures)
        figures.hits += ended.stop_seconds > 0
        figures.chains += 1
        figures.unequal += not same_tree(final_state(logdir), expected)
    return figures


@dataclass
class FullFigures:
    """Counts over all jobs on a full disk.

    Args:
        ended: jobs that did not train to their last update.
        wrong_code: jobs that ended with another code than 0 (a checkpoint fitted) or 75 (none did).
        left_behind: hidden half-written files and folders, over all jobs.
        unequal: jobs whose run, once there was room, did not arrive at the right weights.
    """

    jobs: int = 0
    ended: int = 0
    wrong_code: int = 0
    left_behind: int = 0
    unequal: int = 0
    codes: dict[int, int] = field(default_factory=dict)


def full_disks(jobs: Jobs, root: Path, expected: Any, whole: Path, count: int) -> FullFigures:
    """Jobs that may not write files beyond a size, from 1 kB to all they need, each then run on with room enough."""
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    figures = FullFigures()
    for number in range(count):
        logdir = root / f"{number}"
        limit = 1024 + (largest * number) // max(1, count - 1)
        ended = jobs.run(logdir, limit=limit)
        figures.jobs += 1
        figures.codes[ended.code] = figures.codes.get(ended.code, 0) + 1
        figures.ended += ended.update < _last_update(whole)
        found = find_last(logdir, PROJECT)
        finished = found is not None and found.finished
        figures.wrong_code += ended.code != (0 if finished else 75)
        hidden = [path for path in logdir.rglob(".*") if path.name != ".lock"]
        figures.left_behind += len(hidden)
        if not finished:
            jobs.run(logdir)
        figures.unequal += not same_tree(final_state(logdir), expected)
    return figures


def _last_update(whole: Path) -> int:
    found = find_last(whole, PROJECT)
    assert found is not None
    return found.progress.update


GENTLE: dict[str, tuple[tuple[int, Target], ...]] = {
    "SIGTERM to the process": ((signal.SIGTERM, "process"),),
    "SIGTERM to the group": ((signal.SIGTERM, "group"),),
    "SIGTERM to both": ((signal.SIGTERM, "process"), (signal.SIGTERM, "group")),
    "SIGINT once": ((signal.SIGINT, "group"),),
    "SIGINT twice": ((signal.SIGINT, "group"), (signal.SIGINT, "group")),
}
"""What is sent and to whom; the second follows within a second."""

PLACES = {
    "while scanning": "data.dataset:read_training_set",
    "while loading": "training.assembly:load_start",
    "while sampling": "utils.gallery:Gallery.draw",
    "in mid-update": "optimizer.update:Updater.backward",
    "in mid-save": "utils.archive:write_folder",
}
"""Functions at whose entry a job signals itself."""


def stop_until_done(
    jobs: Jobs, root: Path, expected: Any, hits: int, seed: int, seconds: float, how: str
) -> RunFigures:
    """Chains of jobs that get the signals of `GENTLE[how]` at a random moment, until `hits` have met a living job."""
    chance, figures = random.Random(seed), RunFigures()
    codes = _codes(GENTLE[how][0][0])
    while figures.hits < hits:
        logdir = root / f"chain-{figures.chains:04}"
        while True:
            moments = [chance.uniform(0.0, seconds), chance.uniform(0.0, 1.0)]
            signals = [(moment, *each) for moment, each in zip(moments, GENTLE[how], strict=False)]
            workers = chance.choice([0, 0, 1, 2])
            ended = jobs.run(logdir, *signals, num_workers=workers)
            if _count(ended, codes, logdir, figures):
                break
        figures.chains += 1
        figures.unequal += not same_tree(final_state(logdir), expected)
    return figures


def stop_at_place(
    jobs: Jobs, root: Path, expected: Any, hits: int, place: str, number: int, times: int = 1
) -> RunFigures:
    """Jobs that signal their group when they enter `PLACES[place]`, each then resumed to its end."""
    figures = RunFigures()
    for chain in range(hits):
        logdir = root / f"chain-{chain:04}"
        hit = [PLACES[place], int(number), times]
        ended = jobs.run(logdir, hit=hit, num_workers=chain % 3)
        done = _count(ended, _codes(number), logdir, figures)
        if not done:
            _count(jobs.run(logdir), set(), logdir, figures)
        figures.chains += 1
        figures.unequal += not same_tree(final_state(logdir), expected)
    return figures


def _codes(number: int) -> set[int]:
    """What a shell shows as 130 or 143: with everything saved, or before there was anything to save."""
    return {128 + number, -number}


def _count(ended: Ended, codes: set[int], logdir: Path, figures: RunFigures) -> bool:
    """Count how a job ended; whether its run is finished."""
    figures.codes[ended.code] = figures.codes.get(ended.code, 0) + 1
    figures.hits += ended.code != 0
    figures.wrong_code += ended.code != 0 and ended.code not in codes
    figures.slowest_stop_seconds = max(figures.slowest_stop_seconds, ended.stop_seconds)
    return inspect(logdir, ended, figures)
