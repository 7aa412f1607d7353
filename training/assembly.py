"""From options to a session: every part built once, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batches import Batches
from data.dataset import TrainingSet
from data.report import write_report
from optimizer.build import Part, build_part
from optimizer.ema import Ema, ema_decay, ema_is_on
from optimizer.loss_scale import LossScale
from optimizer.noise import Drawer
from optimizer.objective import Moments, Networks, Objective, build_objective
from optimizer.settings import Settings, part_settings
from optimizer.update import Updater
from training.resuming import check_resume, resolved
from training.session import Session
from utils.archive import Archive, library_versions
from utils.checkpoint import Progress, load_training_state
from utils.config import Options
from utils.console import Bar, start_line
from utils.device import Device, open_device
from utils.files import write_json, write_text
from utils.forward import embed_text, encode_image, predict_noise
from utils.gallery import Gallery
from utils.inputs import Inputs
from utils.logs import LOGGER, open_log_file
from utils.meter import Meter
from utils.model_files import read_model_files
from utils.models import Models, build_models, describe, load_models, noise_scheduler
from utils.optimizer_file import Freezing
from utils.preparation import prepare_networks
from utils.prompts import SamplePlan
from utils.run_dir import RunDir, create_run_dir, open_run_dir
from utils.saving import Retention
from utils.start import Start
from utils.stopping import StopSignal
from utils.timetable import Timetable
from utils.tracking import Tracker
from utils.writer import CheckpointWriter

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def open_session(inputs: Inputs, data: TrainingSet, start: Start, stop: StopSignal) -> Iterator[Session]:
    """The session of a run, new or going on; its run folder is locked and its writer waited for on leaving."""
    options = inputs.loaded.options
    device = open_device(options.device)
    if start.resumed is not None:
        check_resume(start.resumed.record, resolved(options, data.seed), library_versions(), data.fingerprint())
    state = None if start.resumed is None else load_training_state(start.resumed.folder, verify=False)
    models = load_start(start, state)
    with ExitStack() as stack:
        run = open_run(options, start)
        stack.enter_context(run.lock())
        open_log_file(run.log)
        progress = Progress(0, 0, 0, 0) if start.resumed is None else start.resumed.record.progress
        tracker = Tracker(run.folder, resume_update=progress.update if start.resumed is not None else None)
        stack.callback(tracker.close)
        retention = Retention(options.save.keep_last_n, options.save.save_optimizer)
        writer = stack.enter_context(CheckpointWriter(run.ckpts, retention))
        session = _assemble(inputs, data, device, models, run, tracker, writer, stop, progress)
        stack.callback(session.bar.close)
        if state is not None:
            for change in session.restore(state):
                LOGGER.info("%s", change)
        if start.resumed is None:
            write_inputs(session, inputs)
        announce(session)
        yield session


def load_start(start: Start, state: Mapping[str, Any] | None) -> Models:
    """The models to start from: those of the saved state when a run goes on."""
    if state is None:
        return load_models(start.source)
    return build_models(read_model_files(Path(start.source)), state["networks"], start.source)


def open_run(options: Options, start: Start) -> RunDir:
    """The folder of the run that goes on, or a new one."""
    if start.run_folder is not None:
        return open_run_dir(start.run_folder)
    return create_run_dir(Path(options.run.logdir), options.run.project_name)


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
    options, seed = inputs.loaded.options, data.seed
    zero_snr = zero_terminal_snr(options) or models.zero_terminal_snr
    settings = part_settings(inputs.optimizer, options.optimizer, data.options.batch_size * data.options.grad_accum)
    for note in settings.notes:
        LOGGER.info("%s", note)
    parts = build_parts(models, options, settings, inputs, device, data.total_updates)
    scale = LossScale(device.torch_device, tweaks=inputs.optimizer.values.apply_grad_scaler_step_tweaks)
    return Session(
        options=options,
        seed=seed,
        run=run,
        device=device,
        data=data,
        models=models,
        parts=parts,
        networks=build_networks(models, options, device),
        objective=build_run_objective(models, options, device),
        updater=Updater(
            list(parts.values()),
            clip_grad_norm=options.optimizer.clip_grad_norm,
            loss_scale=scale if device.needs_loss_scale else None,
            seed=seed,
        ),
        ema=build_ema(parts, options, data.total_updates, device),
        batches=build_batches(models, options, seed, device),
        tracker=tracker,
        gallery=build_gallery(models, options, seed, device, run, tracker, zero_snr),
        archive=Archive(
            run=run,
            project=options.run.project_name,
            seed=seed,
            files=describe(models, zero_terminal_snr=zero_snr),
            save=options.save,
            options=resolved(options, seed),
            extra={"data": data.fingerprint()},
        ),
        writer=writer,
        bar=Bar(data.total_updates, start=progress.update),
        stop=stop,
        progress=progress,
        window=Meter(),
        epoch_meter=Meter(),
        timetable=Timetable(options.save),
        log_grad_norm=inputs.optimizer.values.log_grad_norm,
    )


def zero_terminal_snr(options: Options) -> bool:
    """Whether zero terminal SNR is asked for, by either spelling."""
    return options.noise.enable_zero_terminal_snr or options.noise.zero_frequency_noise_ratio == -1


def build_parts(
    models: Models, options: Options, settings: Settings, inputs: Inputs, device: Device, total_updates: int
) -> dict[str, Part]:
    """The networks under training, by name."""
    trained = prepare_networks(models, options.model, device)
    how = {
        "unet": (settings.unet, Freezing()),
        "text_encoder": (settings.text_encoder, inputs.optimizer.freezing),
    }
    return {
        name: build_part(name, network, *how[name], total_updates=total_updates, device_type=device.torch_device.type)
        for name, network in trained.items()
    }


def build_networks(models: Models, options: Options, device: Device) -> Networks:
    """The networks as the objective calls them."""
    trained = not options.model.disable_textenc_training

    def moments(pixels: Tensor) -> Moments:
        return Moments(*encode_image(models.vae, device, pixels))

    return Networks(
        unet=partial(predict_noise, models.unet, device),
        encode_text=partial(embed_text, models.text_encoder, device, options.model.clip_skip, trained),
        encode_image=moments,
    )


def build_run_objective(models: Models, options: Options, device: Device) -> Objective:
    """The objective on the noise schedule that the model is trained with."""
    scheduler = noise_scheduler(models, options.noise.train_sampler, zero_terminal_snr(options))
    return build_objective(
        scheduler.alphas_cumprod,
        models.prediction_type,
        options.loss,
        options.noise,
        latent_scale=models.latent_scale,
        device=device.torch_device,
    )


def build_ema(parts: Mapping[str, Part], options: Options, total_updates: int, device: Device) -> Ema | None:
    """The average of the trained weights, if it is asked for."""
    if not ema_is_on(options.ema):
        return None
    decay = ema_decay(options.ema, total_updates)
    LOGGER.info("EMA: rate %.6g every %d updates", decay, options.ema.ema_update_interval)
    where = device.torch_device if options.ema.ema_device == "cuda" else "cpu"
    weights = {name: part.weights() for name, part in parts.items()}
    return Ema(weights, decay=decay, interval=options.ema.ema_update_interval, device=where)


def build_batches(models: Models, options: Options, seed: int, device: Device) -> Batches:
    """The workers' side: they get paths and numbers."""
    drawer = Drawer(
        options.noise,
        seed,
        latent_channels=models.latent_channels,
        vae_factor=models.vae_factor,
        context_shape=(models.max_tokens, models.context_width),
    )
    return Batches(options.data, seed, drawer, pin_memory=device.is_cuda)


def build_gallery(
    models: Models, options: Options, seed: int, device: Device, run: RunDir, tracker: Tracker, zero_snr: bool
) -> Gallery:
    """Where samples are drawn and hung."""
    data = options.data
    plan = SamplePlan(
        options.sample.sample_prompts,
        every=options.sample.sample_steps,
        resolution=data.resolution,
        step=data.bucket_step,
        seed=seed,
        batch_size=data.batch_size,
    )
    return Gallery(
        models,
        plan,
        tracker,
        run.samples,
        clip_skip=options.model.clip_skip,
        zero_terminal_snr=zero_snr,
        device=device.torch_device,
        autocast=device.autocast,
    )


def announce(session: Session) -> None:
    """The totals of the run in a line."""
    parameters = {name: sum(p.numel() for p in part.parameters.values()) for name, part in session.parts.items()}
    data = session.data
    LOGGER.info(
        start_line(
            device=session.device.name,
            precision=session.device.precision,
            parameters=parameters,
            images=len(data.placed),
            buckets=len({bucket for _, bucket in data.placed}),
            epochs=len(data.updates),
            updates=data.total_updates,
        )
    )
    LOGGER.info("run folder %s", session.run.folder)


def write_inputs(session: Session, inputs: Inputs) -> None:
    """Resolved options, the optimizer file and the data report, into the run folder and TensorBoard."""
    values = resolved(session.options, session.seed)
    write_json(session.run.main_json, values)
    path = Path(session.options.optimizer.optimizer_config)
    write_text(session.run.opt_json, path.read_text(encoding="utf-8-sig") if path.exists() else "{}\n")
    report = session.data.report()
    write_report(report, session.run.folder)
    session.tracker.layout()
    session.tracker.text("config", "\n".join(f"{name}: {value}" for name, value in values.items()))
    session.tracker.text("data", "\n".join(report.lines))
    session.tracker.hparams(values)
