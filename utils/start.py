"""What a run starts from: a model, the weights of a checkpoint, or the exact state of an unfinished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.checkpoint import STATE, Checkpoint, is_checkpoint, prove, read_checkpoint
from utils.config import Options
from utils.errors import UserError, printable
from utils.findlast import find_last
from utils.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Start:
    """Where the weights come from.

    Args:
        source: a model folder, file or hub id.
        resumed: the checkpoint whose run goes on exactly; `None` is a new run.
        incomplete: the last checkpoint of a run that was trained to its end and then cut off, before all its files
            were written; those come first, and nothing is trained.
    """

    source: str
    resumed: Checkpoint | None
    incomplete: Checkpoint | None = None

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that goes on."""
        return None if self.resumed is None else self.resumed.folder.parent.parent


def find_start(options: Options) -> Start:
    """What `resume_ckpt` and `resume_mode` mean here and now.

    Raises:
        UserError: findlast finds nothing, or an exact resume is asked for where there is none to be had.
    """
    source, mode = options.model.resume_ckpt, options.model.resume_mode
    if source == "findlast":
        found = find_last(Path(options.run.logdir), options.run.project_name)
        if found is None:
            raise UserError(
                f"resume_ckpt = findlast, but {printable(options.run.logdir)} holds no checkpoint of project "
                f"{printable(options.run.project_name)} that can be used; name a model to start from"
            )
        checkpoint: Checkpoint | None = found.checkpoint
    elif is_checkpoint(Path(source)):
        checkpoint = read_checkpoint(Path(source))
        prove(checkpoint.folder, from_disk=False)
    else:
        checkpoint = None
    return _choose(source, checkpoint, mode)


def _choose(source: str, checkpoint: Checkpoint | None, mode: str) -> Start:
    if checkpoint is None:
        if mode == "exact":
            raise UserError(
                f"resume_mode = exact, but {printable(source)} is no checkpoint with a training state; "
                "use resume_mode weights, or name a checkpoint below logdir"
            )
        return Start(source, None)
    folder = str(checkpoint.folder)
    # Only findlast stands for "go on with what was going on"; who names a finished checkpoint wants its weights.
    if source == "findlast" and mode != "weights" and _is_incomplete(checkpoint):
        return Start(folder, None, incomplete=checkpoint)
    resumable = checkpoint.has_state and not checkpoint.record.finished and not checkpoint.record.ema
    if mode == "exact" and not resumable:
        why = "its run is finished" if checkpoint.record.finished else f"it holds no {STATE}"
        raise UserError(f"resume_mode = exact, but {printable(folder)} cannot go on: {why}; use resume_mode weights")
    return Start(folder, checkpoint if resumable and mode != "weights" else None)


def _is_incomplete(checkpoint: Checkpoint) -> bool:
    run = RunDir(checkpoint.folder.parent.parent)
    return checkpoint.record.finished and checkpoint.has_state and not run.finished.exists()
