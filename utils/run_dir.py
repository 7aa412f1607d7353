"""The folder of a run: its name, its paths, and the lock that keeps a second run out of it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.errors import TryLaterError, printable

LOCK = ".lock"
_LOCK_PATIENCE_SECONDS = 15.0
_NAME = re.compile(r"[\w.\- ]+")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10))}
_NAME_BYTES = 120


def project_name_problem(name: str) -> str | None:
    """Why `name` cannot be part of file names, as a sentence, or `None` when it can."""
    if not _NAME.fullmatch(name):
        return "only letters, digits, '.', '_', '-' and spaces are allowed"
    if name[0] in ". " or name[-1] in ". ":
        return "it must not begin or end with '.' or a space"
    if len(name.encode()) > _NAME_BYTES:
        return f"it must not be longer than {_NAME_BYTES} bytes"
    if name.split(".")[0].lower() in _RESERVED:
        return "Windows keeps this name for a device"
    return None


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of one run below `logdir`; all files carry the name of the folder."""

    folder: Path

    @property
    def name(self) -> str:
        """`{project}-{YYYYMMDD-HHMMSS}`."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """What the console showed, and more."""
        return self.folder / f"{self.name}.log"

    @property
    def main_json(self) -> Path:
        """The resolved options; itself a valid `--config`."""
        return self.folder / f"{self.name}_main.json"

    @property
    def opt_json(self) -> Path:
        """The resolved optimizer file."""
        return self.folder / f"{self.name}_opt.json"

    @property
    def metrics(self) -> Path:
        """The scalars, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of the sample pictures."""
        return self.folder / "samples"

    @property
    def ckpts(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "ckpts"

    @property
    def control(self) -> Path:
        """The file by which a user steers the running job."""
        return self.folder / "control"

    @property
    def finished(self) -> Path:
        """Says that the run was trained to its end and that all its files are written."""
        return self.folder / "finished.json"

    @contextmanager
    def lock(self, patience_seconds: float = _LOCK_PATIENCE_SECONDS) -> Iterator[None]:
        """Keep every other run out of this folder while the block runs.

        The system drops the lock when the process ends, however it ends. `patience_seconds` covers worker processes
        that outlive a killed run for a moment. Raises TryLaterError when another run holds the folder.
        """
        # filelock drags asyncio in, which --help need not wait for.
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK, timeout=patience_seconds, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise TryLaterError(
                f"another run is at work in {printable(self.folder)}. Stop it first, or start a new run."
            ) from None
        try:
            yield
        finally:
            lock.release()


def create_run_dir(logdir: Path, project: str, *, now: datetime.datetime | None = None) -> RunDir:
    """A new run folder `{project}-{YYYYMMDD-HHMMSS}`, local time; a second one within the second ends in `-2`."""
    assert project_name_problem(project) is None, f"project name {project!r}: {project_name_problem(project)}"
    stamp = (datetime.datetime.now() if now is None else now).strftime("%Y%m%d-%H%M%S")
    logdir.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = logdir / (f"{project}-{stamp}" if count == 1 else f"{project}-{stamp}-{count}")
        try:
            # Making the folder is the claim: of two runs that try the same name, one fails here.
            folder.mkdir()
        except FileExistsError:
            count += 1
        else:
            return open_run_dir(folder)


def open_run_dir(folder: Path) -> RunDir:
    """The run folder `folder`, with the sub-folders it needs."""
    run = RunDir(folder)
    for sub in (run.samples, run.ckpts):
        sub.mkdir(exist_ok=True)
    return run
