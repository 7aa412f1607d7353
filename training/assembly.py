"""From options to a session: every part built once, in the order in which they need each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data.dataset import TrainingSet
from data.index import cache_folder
from data.lengths import CutCaption, cut_captions, load_lengths, save_lengths
from data.report import write_report
from data.substitutes import Failures
from data.validation_file import COMBINED
from optimizer.settings import part_settings
from training.inputs import Inputs
from training.parts import (
    build_batches,
    build_ema,
    build_gallery,
    build_networks,
    build_parts,
    build_run_objective,
    build_updater,
    build_validation,
    wanted_model,
    zero_terminal_snr,
)
from training.resuming import check_resume, resolved
from training.session import Session
from utils.archive import Archive, library_versions
from utils.checkpoint import Progress, load_training_state
from utils.config import Options
from utils.console import Bar, start_line
from utils.control import ControlFile
from utils.device import Device, open_device
from utils.files import sweep_leftovers, write_json, write_text
from utils.ledger import Ledger
from utils.logs import LOGGER, open_log_file
from utils.meter import Meter
from utils.mirror import open_mirror
from utils.model_files import read_model_files
from utils.models import Models, build_models, describe, load_models
from utils.run_dir import RunDir, create_run_dir, open_run_dir
from utils.saving import Retention
from utils.start import Start
from utils.stopping import StopSignal
from utils.timetable import Timetable
from utils.tracking import Charts, Tracker, charts
from utils.writer import CheckpointWriter


@contextmanager
def open_session(inputs: Inputs, data: TrainingSet, start: Start, stop: StopSignal) -> Iterator[Session]:
    """The session of a run, new or going on; its run folder is locked and its writer waited for on leaving."""
    options = inputs.options
    device = open_device(options.device, bf16_weights=options.optimizer.weight_dtype == "bf16")
    if start.resumed is not None:
        check_resume(start.resumed.record, resolved(options, data.seed), library_versions(), data.fingerprint())
    # A model that cannot be loaded leaves no run folder behind; a run that goes on is locked before it is read.
    models = load_start(start, options, None) if start.resumed is None else None
    with ExitStack() as stack:
        run = open_run(options, start)
        stack.enter_context(run.lock())
        open_log_file(run.log)
        state = None if start.resumed is None else load_training_state(start.resumed.folder, verify=False)
        models = load_start(start, options, state) if models is None else models
        progress = Progress(0, 0, 0, 0) if start.resumed is None else start.resumed.record.progress
        tracker = open_tracker(options, run, None if start.resumed is None else progress.update)
        stack.callback(tracker.close)
        retention = Retention(options.save.keep_last_n, options.save.save_optimizer)
        writer = stack.enter_context(CheckpointWriter(run.ckpts, retention))
        single_files = Path() if options.save.save_ckpt_dir is None else Path(options.save.save_ckpt_dir)
        if single_files.is_dir():
            sweep_leftovers(single_files, owner=run.name)
        session = _assemble(inputs, data, device, models, run, tracker, writer, stop, progress)
        stack.callback(session.bar.close)
        # Not `session.batches.close`: settings that are read again bring other workers.
        stack.callback(lambda: session.batches.close())
        if state is not None:
            for change in session.restore(state):
                LOGGER.info("%s", change)
        else:
            write_inputs(session, inputs)
        announce(session)
        yield session


def load_start(start: Start, options: Options, state: Mapping[str, Any] | None) -> Models:
    """The models to start from: those of the saved state when a run goes on."""
    if state is not None:
        return build_models(read_model_files(Path(start.source)), state["networks"], start.source)
    models = load_models(start.source, wanted_model(options, start.source))
    if models.told:
        LOGGER.info("%s", models.told)
    return models


def open_run(options: Options, start: Start) -> RunDir:
    """The folder of the run that goes on, or a new one."""
    if start.run_folder is not None:
        return open_run_dir(start.run_folder)
    return create_run_dir(Path(options.run.logdir), options.run.project_name)


def open_tracker(options: Options, run: RunDir, resume_update: int | None) -> Tracker:
    """All that listen to the run."""
    mirror = None
    if options.log.wandb:
        mirror = open_mirror(options.run.project_name, options.run.run_name, run.folder)
    return Tracker(run.folder, resume_update=resume_update, mirror=mirror)


def _assemble(
    inputs: Inputs,
    data: TrainingSet,
    device: Device,
    models: Models,
    run: RunDir,
    tracker: Tracker,
    writer: CheckpointWriter,
    stop: StopSignal,
    progress: Progress,
) -> Session:
    options, seed = inputs.options, data.seed
    zero_snr = zero_terminal_snr(options) or models.zero_terminal_snr
    settings = part_settings(inputs.optimizer, options.optimizer, data.options.batch_size * data.options.grad_accum)
    for note in settings.notes:
        LOGGER.info("%s", note)
    parts = build_parts(models, options, settings, inputs.optimizer, device, data.total_updates)
    networks = build_networks(models, options, device)
    archive = Archive(
        run=run,
        project=options.run.project_name,
        seed=seed,
        files=describe(models, zero_terminal_snr=zero_snr),
        save=options.save,
        options=resolved(options, seed),
        extra={"data": data.fingerprint(), "buckets": [list(bucket) for bucket in data.buckets]},
    )
    return Session(
        inputs=inputs,
        options=options,
        seed=seed,
        run=run,
        device=device,
        data=data,
        models=models,
        parts=parts,
        networks=networks,
        objective=build_run_objective(models, options, device),
        updater=build_updater(parts, options, inputs.optimizer, seed, device),
        ema=build_ema(parts, options, data.total_updates, device),
        batches=build_batches(models, options, data, device),
        tracker=tracker,
        gallery=build_gallery(models, options, seed, device, run, tracker, zero_snr),
        validation=build_validation(inputs.validation, data, networks, options, device),
        ledger=Ledger(),
        failures=Failures(),
        control=ControlFile(run.control),
        archive=archive,
        writer=writer,
        bar=Bar(data.total_updates, start=progress.update),
        stop=stop,
        progress=progress,
        window=Meter(),
        epoch_meter=Meter(),
        timetable=Timetable(options.save),
    )


def announce(session: Session) -> None:
    """The totals of the run in a line."""
    parameters = {name: sum(p.numel() for p in part.parameters.values()) for name, part in session.parts.items()}
    data, progress = session.data, session.progress
    to_come = data.total_updates - progress.update
    LOGGER.info(
        start_line(
            device=session.device.name,
            precision=session.device.precision,
            parameters=parameters,
            images=len(data.placed),
            buckets=len({bucket for _, bucket in data.placed}),
            epochs=data.epochs_begun,
            updates=data.total_updates,
            seconds_left=progress.seconds / progress.update * to_come if progress.update else None,
        )
    )
    LOGGER.info("run folder %s", session.run.folder)


def write_inputs(session: Session, inputs: Inputs) -> None:
    """Resolved options, the optimizer file and the data report, into the run folder and TensorBoard."""
    values = resolved(session.options, session.seed)
    write_json(session.run.main_json, values)
    path = Path(session.options.optimizer.optimizer_config)
    write_text(session.run.opt_json, path.read_text(encoding="utf-8-sig") if path.exists() else "{}\n")
    cut = find_cut_captions(session)
    if cut:
        LOGGER.warning("%d captions are longer than the text encoder reads; see cut_captions.txt", len(cut))
    report = session.data.report(cut)
    write_report(report, session.run.folder)
    tracker = session.tracker
    tracker.layout(run_charts(session))
    tracker.text("config", as_json(values))
    tracker.text("optimizer", session.run.opt_json.read_text(encoding="utf-8"))
    if inputs.validation is not None:
        tracker.text("validation", as_json(dataclasses.asdict(inputs.validation)))
    tracker.text("data", "\n".join(report.lines))
    tracker.hparams(values | rates_in_force(session))


def as_json(values: Mapping[str, Any]) -> str:
    """`values` as users write them."""
    return json.dumps(values, indent=2, ensure_ascii=False)


def rates_in_force(session: Session) -> dict[str, Any]:
    """What flags, optimizer file and defaults come to: runs are compared by that, not by where it is written."""
    found: dict[str, Any] = {"lr": None, "lr_scheduler": None}
    for name, label in (("text_encoder", "lr text encoder"), ("unet", "lr")):
        if name in session.parts:
            part = session.parts[name]
            found |= {label: part.rate, "lr_scheduler": part.options["lr_scheduler"], "optimizer": part.optimizer_name}
    return found


def run_charts(session: Session) -> Charts:
    """The charts for what this run will report."""
    watched = [watched.name for watched in session.data.watched]
    if sum(not watched.trained for watched in session.data.watched) > 1:
        watched.append(COMBINED)
    file = session.inputs.validation
    return charts(
        watched,
        relative=file is not None and file.use_relative_loss,
        norms=session.inputs.optimizer.values.log_grad_norm,
        loss_scale=session.device.needs_loss_scale,
        memory=session.device.memory_gib() is not None,
    )


def find_cut_captions(session: Session) -> tuple[CutCaption, ...]:
    """Captions that the text encoder does not read to their end; their lengths are counted once and kept."""
    models = session.models
    folder = cache_folder() if session.options.data.data_index != "off" else None
    name = hashlib.blake2b(b"".join(models.files.tokenizer.values()), digest_size=8).hexdigest()
    known = {} if folder is None else load_lengths(folder, name)
    before = len(known)
    items = [item for item, _ in session.data.placed]
    cut = cut_captions(items, lambda texts: _token_places(models, texts), known, limit=models.max_tokens - 2)
    if folder is not None and len(known) > before:
        save_lengths(folder, name, known)
    return cut


def _token_places(models: Models, texts: Any) -> Any:
    """Where the tokens of each text begin and end, without start and end."""
    found = models.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["offset_mapping"]
