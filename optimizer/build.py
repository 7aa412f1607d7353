"""From settings to a network under training: which of its weights train, its optimizer, its rate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizer.libraries import make_optimizer
from optimizer.schedules import Schedule, build_schedule
from optimizer.settings import PartSettings
from utils.errors import UserError
from utils.optimizer_file import Freezing

_LAYER = re.compile(r"\bencoder\.layers\.(\d+)\.")


@dataclass(slots=True)
class Part:
    """A network under training.

    Args:
        name: "unet" or "text_encoder".
        parameters: those that train, by name.
        optimizer_name: as in the optimizer file.
        rate: the full learning rate, to which the schedule's factor applies.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer_name: str
    optimizer: Optimizer
    schedule: Schedule
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def lr_at(self, done: int) -> float:
        """The learning rate of the update after `done` others."""
        return self.rate * self.schedule.factor(done)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights to sample and to export, by name; live tensors, except where an optimizer averages.

        Schedule-free AdamW takes gradients at one point and answers with another; that one is computed here.
        """
        if self.optimizer_name != "adamw_schedulefree":
            return {name: parameter.detach() for name, parameter in self.parameters.items()}
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        answer = {}
        for name, parameter in self.parameters.items():
            z = self.optimizer.state.get(parameter, {}).get("z")
            live = parameter.detach()
            answer[name] = live if z is None else torch.lerp(live, z.to(live), 1 - 1 / beta1)
        return answer


def build_part(
    name: str,
    module: nn.Module,
    settings: PartSettings,
    freezing: Freezing,
    *,
    total_updates: int,
    device_type: str,
) -> Part:
    """`module` with gradients asked for where it trains and nowhere else, and an optimizer for those weights alone.

    Args:
        module: on its device already.
        freezing: of the text encoder; `Freezing()` trains everything.
        device_type: "cuda" or "cpu"; decides the optimizer when the settings name none.

    Raises:
        UserError: the optimizer cannot be had here, or nothing is left to train.
    """
    parameters = choose_parameters(module, freezing)
    if not parameters:
        raise UserError(
            f"text_encoder_freezing leaves nothing of the {name.replace('_', ' ')} to train; "
            f"use disable_textenc_training for that"
        )
    optimizer_name = default_optimizer(device_type) if settings.optimizer is None else settings.optimizer
    optimizer = make_optimizer(optimizer_name, list(parameters.values()), settings.lr, settings.parameters)
    schedule = build_schedule(
        settings.lr_scheduler,
        total_updates,
        decay=settings.lr_decay_steps,
        warmup=settings.lr_warmup_steps,
        cycles=settings.lr_cycles,
        power=settings.lr_power,
    )
    options = {"lr": settings.lr, "lr_scheduler": settings.lr_scheduler, **settings.parameters}
    return Part(name, module, parameters, optimizer_name, optimizer, schedule, settings.lr, options)


def default_optimizer(device_type: str) -> str:
    """The optimizer when none is named: 8-bit moments where memory is dear, torch's own elsewhere."""
    return "adamw8bit" if device_type == "cuda" else "adamw"


def choose_parameters(module: nn.Module, freezing: Freezing) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; `requires_grad` is set on these and off on all others of `module`."""
    names = [name for name, _ in module.named_parameters()]
    layers = 1 + max((int(match[1]) for match in map(_LAYER.search, names) if match), default=-1)
    chosen = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not is_frozen(name, freezing, layers))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def is_frozen(name: str, freezing: Freezing, layers: int) -> bool:
    """Whether the parameter `name` of a CLIP text encoder with `layers` layers stays as it is."""
    last = freezing.unfreeze_last_n_layers
    match = _LAYER.search(name)
    if match:
        return last is not None and int(match[1]) < layers - last
    if "final_layer_norm." in name:
        return bool(freezing.freeze_final_layer_norm)
    if "embeddings." in name:
        return last is not None if freezing.freeze_embeddings is None else freezing.freeze_embeddings
    return False
