"""The search for the checkpoint that a run goes on from: newest first, proven, each refusal with its reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from utils.checkpoint import Checkpoint, Progress, Record, prove, read_checkpoint
from utils.errors import TryLaterError, printable
from utils.files import REPLACED, is_leftover, restore_all_replaced
from utils.manifest import DamagedError
from utils.run_dir import RunDir

logger = logging.getLogger("emulsion")


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A proven checkpoint, and the newer ones that were passed over, each with the reason."""

    checkpoint: Checkpoint
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The Diffusers folder."""
        return self.checkpoint.folder

    @property
    def run_folder(self) -> Path:
        """The folder of the run that wrote it."""
        return self.folder.parent.parent

    @property
    def record(self) -> Record:
        """What it says of itself."""
        return self.checkpoint.record

    @property
    def progress(self) -> Progress:
        """How far its run was."""
        return self.record.progress

    @property
    def finished(self) -> bool:
        """Whether its run was complete: then its weights start a new one."""
        return self.record.finished

    @property
    def has_state(self) -> bool:
        """Whether an exact resume is possible."""
        return self.checkpoint.has_state


def find_last(logdir: Path, project: str, *, ema: bool = False) -> FoundCheckpoint | None:
    """The newest checkpoint of `project` below `logdir` that proves good, or `None`.

    Newest is what was saved last, by the manifests and not by the file system. `ema` looks for averaged weights instead
    of plain ones. Every checkpoint that is passed over is logged with its reason. A checkpoint of an unfinished run
    counts only with its training state.
    """
    skipped: list[tuple[Path, str]] = []
    candidates: list[Checkpoint] = []
    for folder in sorted(logdir.iterdir()) if logdir.is_dir() else []:
        if (folder / "ckpts").is_dir():
            candidates += _of_run(RunDir(folder), project, skipped)
    found = None
    for candidate in sorted(candidates, key=lambda c: c.saved_at, reverse=True):
        if candidate.record.ema != ema:
            continue
        reason = _refusal(candidate)
        if reason is None:
            found = FoundCheckpoint(candidate, skipped)
            break
        skipped.append((candidate.folder, reason))
    for path, reason in skipped:
        logger.warning("passed over %s: %s", printable(path), reason)
    return found


def _of_run(run: RunDir, project: str, skipped: list[tuple[Path, str]]) -> list[Checkpoint]:
    """The checkpoints of `project` in one run folder; unreadable ones go to `skipped`."""
    if any(run.ckpts.glob(f".*{REPLACED}")):
        try:
            with run.lock(patience_seconds=0):
                restore_all_replaced(run.ckpts)
        except (TryLaterError, OSError):
            logger.info("%s is in use; a save in progress there is left alone", printable(run.folder))
    found = []
    for folder in sorted(run.ckpts.iterdir()):
        if not folder.is_dir() or is_leftover(folder):
            continue
        try:
            checkpoint = read_checkpoint(folder)
        except DamagedError as error:
            # Its manifest cannot tell whose it is, but the name of the run can.
            if run.name.startswith(f"{project}-"):
                skipped.append((folder, str(error)))
        else:
            if checkpoint.record.project == project:
                found.append(checkpoint)
    return found


def _refusal(candidate: Checkpoint) -> str | None:
    if not candidate.good:
        return "it was saved when its run failed, so its weights are doubtful"
    if not (candidate.has_state or candidate.record.finished or candidate.record.ema):
        return "its run is unfinished and its training state is gone"
    try:
        prove(candidate.folder, from_disk=False)
    except DamagedError as error:
        return str(error)
    return None
