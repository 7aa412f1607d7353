"""Starting whole jobs, again and again, sending them signals, and seeing how they end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.findlast import find_last

PROJECT = "job"
Target = Literal["process", "group", "worker"]
TOKENS = {"HF_TOKEN": "hf_canary_8d1f6c", "WANDB_API_KEY": "wandb_canary_3b9e02"}
"""In the environment of every job; not one byte of them may be written anywhere."""
OPTIONS: dict[str, Any] = {
    # Four updates, a checkpoint whenever the last one is done.
    "max_epochs": 2,
    "ckpt_every_n_minutes": 0.003,
    "sample_steps": 2,
    "keep_last_n": 3,
    "no_save_ckpt": False,
}
FILES = "files"
"""The folder of a chain's single files, in its log folder."""


@dataclass
class Ended:
    """How a job ended: its exit code (negative: the signal), and the last update it had finished.

    `signals` is how many found somebody to receive them, `stop_seconds` the time from the first to the end.
    """

    code: int
    update: int
    signals: int
    stop_seconds: float
    orphans: int


class Jobs:
    """Starts jobs in `world` from a process that has everything imported."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, world: Any, options: dict[str, Any]) -> None:
        self._process, self._folder, self._world, self._options = process, folder, world, options

    def arguments(self, logdir: Path, **options: Any) -> list[str]:
        """The command line of the next job of a chain: it goes on if there is something to go on from."""
        from tests.jobs import arguments

        goes_on = {"resume_ckpt": self._world.model}
        if find_last(logdir, PROJECT) is not None:
            # As docs/reliability.md advises: a job that is killed when all is done must not start a new run.
            goes_on = {"resume_ckpt": "findlast", "resume_mode": "exact"}
        given = {**self._options, **goes_on, "save_ckpt_dir": logdir / FILES, **options}
        return arguments(self._world, logdir, **given)

    def run(
        self,
        logdir: Path,
        *signals: tuple[float, int, Target],
        hit: Any = None,
        limit: Any = None,
        broken: bool = False,
        closed: bool = False,
        **options: Any,
    ) -> Ended:
        """Run the next job of a chain; `signals` are (seconds since the one before, number, to whom).

        `hit`, `limit`, `broken` and (as no output) `closed` are explained in `tests/faults/zygote.py`.
        """
        arguments = self.arguments(logdir, **options)
        marks = self._folder / "marks"
        marks.write_text("")
        # A limit would hold for the output, too, which is no file of the job's.
        output = None if closed else str(self._folder / "output") if limit is None else os.devnull
        request: dict[str, Any] = {"arguments": arguments, "output": output, "marks": str(marks)}
        request |= {"hit": hit, "limit": limit, "broken": broken}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid, signalled, received = int(self._line()), None, 0
        for seconds, number, target in signals:
            if self._ended_within(seconds):
                break
            signalled = time.monotonic() if signalled is None else signalled
            with suppress(ProcessLookupError):
                if target == "group":
                    os.killpg(pid, number)
                else:
                    os.kill(pid if target == "process" else _worker(pid), number)
                received += 1
        code = int(self._line())
        stop_seconds = 0.0 if signalled is None else time.monotonic() - signalled
        updates = [int(word) for word in marks.read_text().split()]
        return Ended(code, max(updates, default=0), received, stop_seconds, _orphans(pid))

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
