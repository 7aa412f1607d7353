"""Emulsion fine-tunes Stable Diffusion on folders of captioned pictures: options, parts, loop, and how a run ends."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from training.inputs import Inputs, read_inputs
from utils.console import end_summary
from utils.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_TRY_LATER, OutOfMemoryError, TryLaterError, UserError
from utils.logs import FILE_ONLY, LOGGER, close_logs, escape_lines, occupy_standard_streams, open_console
from utils.options import flat
from utils.seeding import random_seed

# What needs torch is imported when the options are known to be right: a mistake is answered at once.
if TYPE_CHECKING:
    from data.dataset import TrainingSet
    from training.session import Session
    from utils.checkpoint import Kind
    from utils.start import Start
    from utils.stopping import StopSignal

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with the flags `argv` and return its exit code (see docs/reliability.md)."""
    occupy_standard_streams()
    open_console()
    try:
        return run(read_inputs(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return tell(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return tell(TryLaterError(f"{error}; make room and start again"))
    except KeyboardInterrupt:
        # Before or after the run itself, which answers signals in its own way.
        return EXIT_INTERRUPTED
    finally:
        close_logs()


def tell(error: UserError) -> int:
    """Say what is wrong, in words, and return the exit code."""
    LOGGER.error("%s", error, extra=FILE_ONLY)
    if sys.stderr is not None:  # None: a program started without one
        with suppress(OSError, ValueError):
            sys.stderr.write(f"error: {escape_lines(str(error))}\n")
    return error.exit_code


def run(inputs: Inputs) -> int:
    """The story of a run: what to start from, the data, the parts, the loop, the end."""
    from utils.start import find_start
    from utils.stopping import StopSignal

    options = inputs.options
    for warning in inputs.warnings:
        LOGGER.warning("%s", warning)
    with StopSignal(at_once=True) as stop:
        start = find_start(options)
        if start.incomplete is not None and not options.run.dry_run:
            from training.completing import complete

            return complete(start.incomplete, options)
        return work(inputs, read_data(inputs, start), start, stop)


def work(inputs: Inputs, data: TrainingSet, start: Start, stop: StopSignal) -> int:
    """Describe the data, then show the plan or carry it out."""
    for line in (*data.notes, *data.report().lines):
        LOGGER.info("%s", line)
    if inputs.options.run.dry_run:
        return show_plan(inputs, data)
    import torch

    from training.memory import REMEDIES

    try:
        return train_and_save(inputs, data, start, stop)
    except torch.OutOfMemoryError as error:
        what = f"the training does not fit into memory ({str(error).splitlines()[0]})"
        raise OutOfMemoryError(f"{what}; what may help: {REMEDIES}") from error


def read_data(inputs: Inputs, start: Start) -> TrainingSet:
    """The training set, with the seed that the run has, picks, or goes on with."""
    from data.dataset import read_training_set

    options = inputs.options
    seed = options.run.seed
    if seed == -1:
        seed = random_seed() if start.resumed is None else start.resumed.record.seed
        LOGGER.info("seed %d", seed)
    return read_training_set(
        options.data,
        seed=seed,
        epochs=options.run.max_epochs,
        max_steps=options.run.max_steps,
        validation=inputs.validation,
    )


def show_plan(inputs: Inputs, data: TrainingSet) -> int:
    """What a dry run says beyond the data: the resolved options, the rates and the number of updates."""
    from data.schedule import write_schedule
    from optimizer.plot import rate_lines
    from optimizer.settings import part_settings

    options = inputs.options
    LOGGER.info(json.dumps({**flat(options), "seed": data.seed}, indent=2, ensure_ascii=False))
    settings = part_settings(inputs.optimizer, options.optimizer, options.data.batch_size * options.data.grad_accum)
    for name, part in (("unet", settings.unet), ("text encoder", settings.text_encoder)):
        for line in rate_lines(name, part, data.total_updates):
            LOGGER.info("%s", line)
    if options.data.write_schedule:
        LOGGER.info("wrote %s", write_schedule(Path(), 0, data.plan(0), data.caption))
    LOGGER.info("dry run: %d updates would be trained", data.total_updates)
    return EXIT_DONE


def train_and_save(inputs: Inputs, data: TrainingSet, start: Start, stop: StopSignal) -> int:
    """Train to the end or to a stop, save, and say where everything is."""
    from training.assembly import open_session
    from training.loop import train

    with open_session(inputs, data, start, stop) as session:
        try:
            train(session)
        except UserError as error:
            # The last update is whole, so this goes on exactly once the cause is mended.
            if not stop.at_once:
                session.save("interrupted" if session.exact_after(error) else "errored", wait=True)
            raise
        except Exception:
            # What was learned up to here is worth a look; findlast never takes it, an older checkpoint is exact.
            if not stop.at_once:
                session.save("errored", wait=True)
            raise
        return finish(session)


def finish(session: Session) -> int:
    """Save the last checkpoint, say where everything is, and return the exit code."""
    from training.between import report_saves
    from training.completing import mark_finished

    if session.complete:
        kind: Kind = "" if session.options.save.no_prepend_last else "last"
    else:
        kind = "interrupted"
    report_saves(session, session.writer.close())
    results = session.save(kind, wait=True)
    saved = results[-1]
    paths: dict[str, object] = {"run folder": session.run.folder}
    if saved.folder is not None:
        paths["checkpoint"] = saved.folder
    if not session.options.save.no_save_ckpt and saved.error is None:
        paths["single file"] = session.archive.single_file(saved.record)
    with suppress(OSError):
        if any(session.run.samples.iterdir()):
            paths["samples"] = session.run.samples
    paths["TensorBoard"] = f"tensorboard --logdir {session.options.run.logdir}"
    LOGGER.info(
        end_summary(
            outcome="finished" if session.complete else (session.stop.requested or "stopped"),
            updates=session.progress.update,
            images=session.progress.images,
            seconds=session.progress.seconds,
            loss=session.last_loss,
            paths=paths,
        )
    )
    # As late as can be: what is killed before this is taken up again, what is killed after it has nothing left to do.
    session.tracker.close()
    complete = mark_finished(session.run, saved.record, results) if session.complete else saved.folder is not None
    if not complete:
        return EXIT_TRY_LATER
    return session.stop.exit_code if not session.complete and session.stop.exit_code is not None else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
