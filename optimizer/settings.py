"""Each network's settings: the flags over the optimizer file over the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizer.schedules import Schedule, build_schedule
from utils.config import OptimizerOptions
from utils.optimizer_file import OptimizerFile, PartValues, given_parameters
from utils.optimizer_names import DEFAULT_RATE, DEFAULT_RATES, FINDS_ITS_RATE, LOWEST_FACTOR, PARAMETERS, betas_of

SCALE_LR_EXPONENT = 0.55


@dataclass(frozen=True, slots=True)
class PartSettings:
    """How one network is trained: the file, the flags and the defaults put together.

    Args:
        optimizer: `None` leaves the choice to the device.
        lr: scaled already, if `scale_lr` asks for it.
        parameters: those that the user gave, by the names of the file.
    """

    optimizer: str | None
    lr: float
    lr_scheduler: str
    lr_decay_steps: int | None
    lr_warmup_steps: int | None
    lr_cycles: int
    lr_power: float
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """Both networks' settings, with a line for the log for each thing worth knowing."""

    unet: PartSettings
    text_encoder: PartSettings
    notes: tuple[str, ...]


def part_settings(file: OptimizerFile, options: OptimizerOptions, images_per_update: int) -> Settings:
    """The settings of both networks: flags over the file's base over the defaults, the text encoder's own on top.

    Args:
        images_per_update: batch_size * grad_accum, for `scale_lr`.
    """
    flags = {name: getattr(options, name) for name in ("lr", "lr_scheduler", "lr_decay_steps", "lr_warmup_steps")}
    base = dataclasses.replace(file.base, **{name: value for name, value in flags.items() if value is not None})
    own = {field.name: getattr(file.text_encoder, field.name) for field in dataclasses.fields(PartValues)}
    text = dataclasses.replace(base, **{name: value for name, value in own.items() if value is not None})
    rates = _rates(file, base, text)
    notes = list(file.notes)
    if options.scale_lr:
        factor = images_per_update**SCALE_LR_EXPONENT
        rates = (rates[0] * factor, rates[1] * factor)
        notes.append(
            f"scale_lr: times {images_per_update}^{SCALE_LR_EXPONENT} = {factor:.4g}, "
            f"so lr {rates[0]:.4g} for the unet and {rates[1]:.4g} for the text encoder"
        )
    names = ("unet", "text encoder")
    parts = [_settings(values, rate) for values, rate in zip((base, text), rates, strict=True)]
    for name, part in zip(names, parts, strict=True):
        optimizer = part.optimizer
        if optimizer in FINDS_ITS_RATE and part.lr < LOWEST_FACTOR:
            notes.append(f"{name}: lr = {part.lr:g} is a factor on the rate that {optimizer} finds; 0.1 to 1 is usual")
        if "lr" not in PARAMETERS[optimizer or "adamw"] and options.lr is not None:
            notes.append(f"{name}: lr has no effect: {optimizer} takes none")
    return Settings(parts[0], parts[1], tuple(notes))


def _rates(file: OptimizerFile, base: PartValues, text: PartValues) -> tuple[float, float]:
    """The rates of both networks before `scale_lr`."""
    in_file = _rate(file.base)
    unet = _rate(base)
    own = file.text_encoder.lr
    if own is None:
        # A text encoder with an optimizer of another kind starts from that kind's usual rate.
        same_kind = DEFAULT_RATES.get(base.optimizer or "") == DEFAULT_RATES.get(text.optimizer or "")
        rate = unet if same_kind else DEFAULT_RATES.get(text.optimizer or "", DEFAULT_RATE)
        return unet, rate * file.values.text_encoder_lr_scale
    # The flag sets the base; the ratio that the file states between the two stays.
    return unet, own * (unet / in_file) if in_file > 0 else own


def _rate(values: PartValues) -> float:
    return DEFAULT_RATES.get(values.optimizer or "", DEFAULT_RATE) if values.lr is None else values.lr


def _settings(values: PartValues, rate: float) -> PartSettings:
    optimizer = values.optimizer or "adamw"
    takes = PARAMETERS[optimizer]
    parameters = {name: value for name, value in given_parameters(values).items() if name in takes and name != "lr"}
    if "betas" in parameters and len(parameters["betas"]) != betas_of(optimizer):
        del parameters["betas"]  # the UNet's, whose optimizer takes another number of them
    return PartSettings(
        optimizer=values.optimizer,
        lr=rate,
        lr_scheduler="constant" if values.lr_scheduler is None else values.lr_scheduler,
        lr_decay_steps=values.lr_decay_steps,
        lr_warmup_steps=values.lr_warmup_steps,
        lr_cycles=3 if values.lr_cycles is None else values.lr_cycles,
        lr_power=2.0 if values.lr_power is None else values.lr_power,
        parameters=parameters,
    )


def schedule_of(settings: PartSettings, updates: int) -> Schedule:
    """The schedule of a network over a run of `updates`."""
    return build_schedule(
        settings.lr_scheduler,
        updates,
        decay=settings.lr_decay_steps,
        warmup=settings.lr_warmup_steps,
        cycles=settings.lr_cycles,
        power=settings.lr_power,
    )
