"""Whole jobs that are killed, stopped and resumed until they are done, and compared with one that was left alone."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.checkpoint import load_training_state, prove
from utils.errors import UserError
from utils.findlast import find_last
from utils.tree import same_tree

PROJECT = "job"
Target = Literal["process", "group", "worker"]
TOKENS = {"HF_TOKEN": "hf_canary_8d1f6c", "WANDB_API_KEY": "wandb_canary_3b9e02"}
"""In the environment of every job; not one byte of them may be written anywhere."""
OPTIONS: dict[str, Any] = {
    "max_epochs": 6,
    "ckpt_every_n_minutes": 0.005,
    "sample_steps": 4,
    "ema_decay_rate": 0.9,
    "ema_update_interval": 1,
    "keep_last_n": 3,
}


@dataclass
class Ended:
    """How a job ended: its exit code (negative: the signal), and the last update it had finished.

    `stop_seconds` is the time from the first signal to the end.
    """

    code: int
    update: int
    stop_seconds: float
    orphans: int


class Jobs:
    """Starts jobs in `world` from a process that has everything imported."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, world: Any, options: dict[str, Any]) -> None:
        self._process, self._folder, self._world, self._options = process, folder, world, options

    def arguments(self, logdir: Path, **options: Any) -> list[str]:
        """The command line of the next job of a chain: it goes on if there is something to go on from."""
        from tests.jobs import arguments

        found = find_last(logdir, PROJECT)
        source = self._world.model if found is None else "findlast"
        return arguments(self._world, logdir, **{**self._options, "resume_ckpt": source, **options})

    def run(self, logdir: Path, *signals: tuple[float, int, Target], hit: Any = None, **options: Any) -> Ended:
        """Run the next job of a chain; `signals` are (seconds since the one before, number, to whom)."""
        arguments = self.arguments(logdir, **options)
        marks = self._folder / "marks"
        marks.write_text("")
        request = {"arguments": arguments, "output": str(self._folder / "output"), "marks": str(marks), "hit": hit}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid, signalled = int(self._line()), None
        for seconds, number, target in signals:
            if self._ended_within(seconds):
                break
            signalled = time.monotonic() if signalled is None else signalled
            with suppress(ProcessLookupError):
                if target == "group":
                    os.killpg(pid, number)
                else:
                    os.kill(pid if target == "process" else _worker(pid), number)
        code = int(self._line())
        stop_seconds = 0.0 if signalled is None else time.monotonic() - signalled
        updates = [int(word) for word in marks.read_text().split()]
        return Ended(code, max(updates, default=0), stop_seconds, _orphans(pid))

    @property
    def output(self) -> str:
        """What all jobs so far have written."""
        return (self._folder / "output").read_text(errors="replace")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that starts jobs has died"
        return line.decode()

    def _ended_within(self, seconds: float) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], seconds)[0])


@contextmanager
def jobs(folder: Path, world: Any, **options: Any) -> Iterator[Jobs]:
    """`Jobs` in `world` with their output in `folder`; `options` over `OPTIONS`."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Unbuffered, so that select sees every line that readline has not taken.
        bufsize=0,
        env=os.environ | TOKENS | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield Jobs(process, folder, world, {**OPTIONS, **options})
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.kill()


def _worker(pid: int) -> int:
    """A worker of the job `pid`; raises ProcessLookupError when it has none just now."""
    for entry in sorted(Path("/proc").glob("[0-9]*/stat")):
        with suppress(OSError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if fields[1] == str(pid) and fields[0] != "Z":
                return int(entry.parent.name)
    raise ProcessLookupError


def _orphans(group: int, patience_seconds: float = 10.0) -> int:
    """Processes of the group that are still there when the job has been gone for a while."""
    end = time.monotonic() + patience_seconds
    while True:
        alive = 0
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, IndexError):
                fields = entry.read_text().rpartition(")")[2].split()
                alive += fields[2] == str(group) and fields[0] != "Z"
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.02)


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
