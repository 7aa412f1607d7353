"""What is left to do for a run that was trained to its end: saying so, or the files it was kept from writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.archive import Archive
from utils.checkpoint import Checkpoint, Record, load_training_state, prove
from utils.config import Options
from utils.errors import EXIT_DONE, EXIT_TRY_LATER, UserError, printable
from utils.files import sweep_leftovers, write_json
from utils.logs import LOGGER, open_log_file
from utils.model_files import read_model_files
from utils.run_dir import RunDir, open_run_dir
from utils.saving import Retention
from utils.tree import Tree
from utils.writer import CheckpointWriter, Save, SaveResult


def mark_finished(run: RunDir, record: Record, results: Sequence[SaveResult]) -> bool:
    """Note in the run folder that nothing is left to write; whether that is so.

    Without the note the next `findlast` writes what is missing; with it, that starts a new run from the weights.
    """
    if any(result.error is not None for result in results):
        LOGGER.warning(
            "not everything could be written; --resume_ckpt findlast writes the rest, once the cause is gone"
        )
        return False
    try:
        write_json(run.finished, {"checkpoint": record.name, "updates": record.progress.update})
    except OSError as error:
        LOGGER.warning("%s cannot be written: %s", run.finished, str(error))
        return False
    return True


def complete(checkpoint: Checkpoint, options: Options) -> int:
    """Write what the run of `checkpoint` lacks, train nothing, and return the exit code.

    Raises:
        TryLaterError: another job is at work in its folder.
    """
    run, record = open_run_dir(checkpoint.folder.parent.parent), checkpoint.record
    retention = Retention(options.save.keep_last_n, options.save.save_optimizer)
    with run.lock():
        open_log_file(run.log)
        LOGGER.info("%s was trained to its end and then cut off: what it lacks is written now", run.folder)
        state = load_training_state(checkpoint.folder, verify=False)
        extra = dict(record.extra)
        archive = Archive(
            run=run,
            project=record.project,
            seed=record.seed,
            files=read_model_files(checkpoint.folder),
            save=options.save,
            options=extra.pop("options"),
            extra=extra,
        )
        with CheckpointWriter(run.ckpts, retention) as writer:
            results = _write_missing(archive, writer, record, state)
        if not mark_finished(run, record, results):
            return EXIT_TRY_LATER
        LOGGER.info("%s is complete; start again to train a new run from its weights", checkpoint.folder)
    return EXIT_DONE


def _write_missing(archive: Archive, writer: CheckpointWriter, record: Record, state: Tree) -> list[SaveResult]:
    single_files = archive.single_file(record).parent
    if single_files.is_dir():
        sweep_leftovers(single_files, owner=archive.run.name)
    results = []
    for save in archive.saves(record.progress, record.kind, finished=True, ema=state["ema"] is not None):
        folder = archive.run.ckpts / save.record.name
        if not _is_whole(folder):
            results += writer.save_now(state, [save])
        elif save.also is not None and not archive.single_file(save.record).exists():
            results.append(_write_others(save, folder, state))
    return results


def _is_whole(folder: Path) -> bool:
    try:
        prove(folder, from_disk=False)
    except UserError:
        return False
    return True


def _write_others(save: Save, folder: Path, state: Tree) -> SaveResult:
    assert save.also is not None
    error = None
    try:
        save.also(state)
    except Exception as failure:  # noqa: BLE001  as in the writer: a full disk comes in many kinds
        error = failure
        LOGGER.warning("%s was saved, but not its other files: %s", save.record.name, printable(failure))
    return SaveResult(save.record, folder, error, 0.0, 0.0)
