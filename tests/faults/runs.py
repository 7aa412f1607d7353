"""Whole jobs that are killed, stopped and resumed until they are done, and compared with one that was left alone."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.starts import FILES, PROJECT, Ended, Jobs, Target
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
        astray: chains that ended in more than one run folder, or without the single files.
        orphans: processes that outlived their job.
        wrong_code: jobs that ended with another exit code than they should have.
    """

    hits: int = 0
    chains: int = 0
    unusable: int = 0
    lost: int = 0
    most_lost: int = 0
    unequal: int = 0
    astray: int = 0
    orphans: int = 0
    wrong_code: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    slowest_stop_seconds: float = 0.0


def final_state(logdir: Path) -> Any:
    """The training state of the finished run in `logdir`, or `None`."""
    found = find_last(logdir, PROJECT)
    return load_training_state(found.folder) if found is not None and found.finished and found.has_state else None


def inspect(logdir: Path, ended: Ended, figures: RunFigures) -> None:
    """Count what a job has left, however it ended."""
    reported = 0
    for run in logdir.iterdir() if logdir.is_dir() else []:
        for folder in (run / "ckpts").iterdir() if (run / "ckpts").is_dir() else []:
            if not folder.name.startswith("."):
                try:
                    prove(folder, from_disk=False)
                except UserError:
                    figures.unusable += 1
        reported = max(
            [reported, *(_update(line) for log in run.glob("*.log") if log.is_file() for line in _saved(log))]
        )
    found = find_last(logdir, PROJECT)
    reached = 0 if found is None else found.progress.update
    figures.lost += reached < reported
    figures.most_lost = max(figures.most_lost, ended.update - reached)
    figures.orphans += ended.orphans
    assert ended.code != 0 or (found is not None and found.finished), "a job that ends well leaves a finished run"


def compare(logdir: Path, expected: Any, figures: RunFigures, *, files: bool = True) -> None:
    """Count a chain that has come to its end, and what is wrong with it; `files`: it was to write single files."""
    figures.chains += 1
    figures.unequal += not same_tree(final_state(logdir), expected)
    # A job that ended before its first checkpoint leaves a folder, too, and the next one has nothing to go on from.
    begun = [run for run in logdir.iterdir() if any(run.glob("ckpts/[!.]*"))]
    last = [path.name for run in begun for path in run.glob("ckpts/last-*")]
    wanted = {f"{name}.safetensors" for name in last} if files else set()
    here = {path.name for path in logdir.glob(f"{FILES}/last-*.safetensors")}
    figures.astray += not (len(begun) == 1 and last and (begun[0] / "finished.json").exists() and wanted == here)


def _saved(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if " saved " in line and "-gs" in line]


def _update(line: str) -> int:
    return int(line.rpartition("-gs")[2][:5])


def is_over(logdir: Path, ended: Ended) -> bool:
    """Whether a chain has come to its end.

    A kill may come between the last save and the end; then the next job completes the files. Or when even that is done:
    then that job is told, with exit code 2, that there is nothing to go on with.
    """
    return ended.code == 0 or (ended.code == 2 and any(logdir.glob("*/finished.json")))


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
            over = is_over(logdir, ended)
            figures.wrong_code += not over and ended.code != -signal.SIGKILL
            inspect(logdir, ended, figures)
            if over:
                break
        compare(logdir, expected, figures)
        shutil.rmtree(logdir)
    return figures


KILLS_A_JOB = 3
"""The loader gives up when the fourth start in a row brings nothing."""


def kill_workers(jobs: Jobs, root: Path, expected: Any, hits: int, seed: int, seconds: float) -> RunFigures:
    """Jobs that lose workers at random moments and go on, until `hits` workers have been killed."""
    chance, figures = random.Random(seed), RunFigures()
    while figures.hits < hits:
        logdir = root / f"chain-{figures.chains:04}"
        kills: list[tuple[float, int, Target]] = [
            (chance.uniform(0.0, seconds), signal.SIGKILL, "worker") for _ in range(min(KILLS_A_JOB, hits))
        ]
        ended = jobs.run(logdir, *kills, num_workers=2)
        _count(ended, set(), logdir, figures)
        figures.hits += ended.signals
        compare(logdir, expected, figures)
        shutil.rmtree(logdir)
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
    "while scanning": ("data.dataset:read_training_set", 1),
    "while loading": ("training.assembly:load_start", 1),
    "while sampling": ("utils.sampling:_draw", 3),
    "while validating": ("training.between:losses_of_probe", 8),
    "in mid-update": ("optimizer.update:Updater.backward", 8),
    "in mid-save": ("utils.archive:write_folder", 4),
}
"""Functions at whose entry a job signals itself, and how often a job calls them at least."""


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
            over = is_over(logdir, ended)
            _count(ended, codes | {2} if over else codes, logdir, figures)
            if over:
                break
        compare(logdir, expected, figures)
        shutil.rmtree(logdir)
    return figures


def stop_at_place(
    jobs: Jobs,
    root: Path,
    expected: Any,
    hits: int,
    place: str,
    numbers: tuple[int, ...],
    times: int = 1,
    **options: Any,
) -> RunFigures:
    """Jobs that signal their group at one of the times they enter `PLACES[place]`, each then resumed to its end.

    `numbers` are the signals, in turn; `times`: how often each is sent.
    """
    chance, figures = random.Random(1), RunFigures()
    function, calls = PLACES[place]
    while figures.hits < hits:
        logdir = root / f"chain-{figures.chains:04}"
        number = numbers[figures.chains % len(numbers)]
        hit = [function, chance.randint(1, calls), int(number), times]
        ended = jobs.run(logdir, hit=hit, num_workers=figures.chains % 3, **options)
        _count(ended, _codes(number), logdir, figures)
        if ended.code != 0:
            _count(jobs.run(logdir, **options), set(), logdir, figures)
        compare(logdir, expected, figures, files=not options.get("no_save_ckpt"))
        shutil.rmtree(logdir)
    return figures


def broken_sinks(jobs: Jobs, root: Path, expected: Any, count: int) -> RunFigures:
    """Jobs whose logs, figures and samples cannot be written, every other one without standard streams as well."""
    figures = RunFigures()
    for number in range(count):
        logdir = root / f"chain-{number:04}"
        _count(jobs.run(logdir, broken=True, closed=number % 2 == 0), set(), logdir, figures)
        compare(logdir, expected, figures)
    return figures


def _codes(number: int) -> set[int]:
    """What a shell shows as 130 or 143: with everything saved, or before there was anything to save."""
    return {128 + number, -number}


def _count(ended: Ended, codes: set[int], logdir: Path, figures: RunFigures) -> None:
    """Count how a job ended, and what it has left."""
    figures.codes[ended.code] = figures.codes.get(ended.code, 0) + 1
    figures.hits += ended.code != 0
    figures.wrong_code += ended.code != 0 and ended.code not in codes
    figures.slowest_stop_seconds = max(figures.slowest_stop_seconds, ended.stop_seconds)
    inspect(logdir, ended, figures)
