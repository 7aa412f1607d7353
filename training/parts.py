"""The parts that learn and those that watch, each built from its options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.batches import BatchSource
from data.dataset import TrainingSet
from data.probes import Probe, Validation
from data.substitutes import pools
from data.validation_file import ValidationFile
from data.workers import Batches
from optimizer.build import Memory, Part, build_part
from optimizer.ema import Ema, ema_decay, ema_is_on
from optimizer.in_backward import UpdaterInBackward
from optimizer.loss_scale import LossScale
from optimizer.noise import Drawer
from optimizer.objective import Moments, Networks, Objective, build_objective, to_unit_range
from optimizer.probe import probe_losses
from optimizer.settings import Settings
from optimizer.update import Updater
from utils.checkpoint import is_checkpoint
from utils.config import Options
from utils.device import Device
from utils.errors import UserError
from utils.findlast import find_last
from utils.forward import embed_text, encode_image, predict_noise
from utils.gallery import Gallery
from utils.logs import LOGGER
from utils.models import Models, load_models, noise_scheduler, tokenize
from utils.optimizer_file import Freezing, OptimizerFile
from utils.preparation import prepare_networks
from utils.prompts import SamplePlan
from utils.run_dir import RunDir
from utils.source import Wanted
from utils.tracking import Tracker

if TYPE_CHECKING:
    from torch import Tensor

Losses = Mapping[str, "Tensor"]


def zero_terminal_snr(options: Options) -> bool:
    """Whether zero terminal SNR is asked for, by either spelling."""
    return options.noise.enable_zero_terminal_snr or options.noise.zero_frequency_noise_ratio == -1


def build_parts(
    models: Models, options: Options, settings: Settings, file: OptimizerFile, device: Device, total_updates: int
) -> dict[str, Part]:
    """The networks under training, by name."""
    trained = prepare_networks(models, options.model, device)
    how = {"unet": (settings.unet, Freezing()), "text_encoder": (settings.text_encoder, file.freezing)}
    memory = Memory(options.optimizer.weight_dtype == "bf16", options.optimizer.step_in_backward)
    return {
        name: build_part(
            name,
            network,
            *how[name],
            total_updates=total_updates,
            device_type=device.torch_device.type,
            memory=memory,
        )
        for name, network in trained.items()
    }


def build_updater(
    parts: Mapping[str, Part], options: Options, file: OptimizerFile, seed: int, device: Device
) -> Updater:
    """What changes the weights.

    Raises:
        UserError: step_in_backward together with what it excludes.
    """
    scale = None
    if device.needs_loss_scale:
        scale = LossScale(device.torch_device, tweaks=file.values.apply_grad_scaler_step_tweaks)
    clip = options.optimizer.clip_grad_norm
    if options.optimizer.step_in_backward:
        return UpdaterInBackward(
            list(parts.values()),
            seed=seed,
            grad_accum=options.data.grad_accum,
            clip_grad_norm=clip,
            loss_scale=scale,
        )
    return Updater(list(parts.values()), seed=seed, clip_grad_norm=clip, loss_scale=scale)


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
    if zero_terminal_snr(options) and models.prediction_type == "epsilon":
        LOGGER.warning(
            "zero terminal SNR with a model that predicts the noise: at the last timestep there is nothing else, so "
            "it learns nothing there and samples come out wrong; use it with v-prediction, or leave it out"
        )
    scheduler = noise_scheduler(models, "ddpm", zero_terminal_snr(options))
    return build_objective(
        scheduler.alphas_cumprod,
        models.prediction_type,
        options.loss,
        options.noise,
        latent_scale=models.latent_scale,
        device=device.torch_device,
    )


def build_ema(parts: Mapping[str, Part], options: Options, total_updates: int, device: Device) -> Ema | None:
    """The average of the trained weights, if it is asked for, started from them or from `ema_resume_model`.

    Raises:
        UserError: it is to live on a GPU that this run does not use, or its model is not to be found.
    """
    ema = options.ema
    if not ema_is_on(ema):
        return None
    if ema.ema_device == "cuda" and not device.is_cuda:
        raise UserError("ema_device = cuda, but this run computes on the CPU; use ema_device cpu")
    decay = ema_decay(ema, total_updates)
    LOGGER.info("EMA: rate %.6g every %d updates", decay, ema.ema_update_interval)
    where = device.torch_device if ema.ema_device == "cuda" else "cpu"
    weights = {name: part.weights() for name, part in parts.items()}
    average = Ema(weights, decay=decay, interval=ema.ema_update_interval, device=where)
    if ema.ema_resume_model is not None:
        models = load_models(_average_source(ema.ema_resume_model, options))
        for name in parts:
            average.load_tensors(name, dict(getattr(models, name).named_parameters()))
    return average


def _average_source(source: str, options: Options) -> str:
    if source != "findlast":
        return source
    found = find_last(Path(options.run.logdir), options.run.project_name, ema=True)
    if found is None:
        raise UserError(
            f"ema_resume_model = findlast, but {options.run.logdir} holds no averaged checkpoint of project "
            f"{options.run.project_name}; name a model, or leave it out to start from the plain weights"
        )
    return str(found.folder)


def build_batches(models: Models, options: Options, data: TrainingSet, device: Device) -> Batches:
    """The workers' side: they get paths and numbers."""
    drawer = Drawer(
        options.noise,
        data.seed,
        latent_channels=models.latent_channels,
        vae_factor=models.vae_factor,
        context_shape=(models.max_tokens, models.context_width),
    )
    source = BatchSource(options.data, data.seed, drawer, pools(data.placed))
    return Batches(source, pin_memory=device.is_cuda)


def build_gallery(
    models: Models, options: Options, seed: int, device: Device, run: RunDir, tracker: Tracker, zero_snr: bool
) -> Gallery:
    """Where samples are drawn and hung."""
    data = options.data
    prompts = options.sample.sample_prompts
    plan = SamplePlan(
        None if prompts == "none" else prompts,
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


def build_validation(
    file: ValidationFile | None, data: TrainingSet, networks: Networks, options: Options, device: Device
) -> Validation | None:
    """The validation passes, if there is anything to watch."""
    if file is None or not data.watched:
        return None

    def encode(pixels: Tensor) -> Tensor:
        return networks.encode_image(to_unit_range(pixels.to(device.torch_device))).mean

    return Validation(
        sets=data.watched,
        bucket_of=data.bucket_of,
        encode=encode,
        timesteps=(options.noise.timestep_start, options.noise.timestep_end),
        seed=file.seed,
        batch_size=file.batch_size,
        relative=file.use_relative_loss,
        keep_tags=options.data.keep_tags,
    )


def losses_of_probe(models: Models, networks: Networks, objective: Objective, device: Device, probe: Probe) -> Losses:
    """Plain and configured losses of a probe's images, (B,) each."""
    where = device.torch_device
    return probe_losses(
        networks,
        objective,
        probe.latents.to(where),
        tokenize(models, probe.captions).to(where),
        probe.timesteps.to(where),
        probe.noise.to(where),
    )


def wanted_model(options: Options, source: str) -> Wanted:
    """What the options say of the model `source` to start from."""
    model = options.model
    if is_checkpoint(Path(source)):
        # The other words describe the model that a chain of runs began with; checkpoints of ours have no variants.
        return Wanted(prediction_type=model.prediction_type)
    return Wanted(
        variant=model.hub_variant,
        revision=model.hub_revision,
        prediction_type=model.prediction_type,
        model_config=model.model_config,
        ema=model.model_ema,
    )
