"""From settings to a network under training: which of its weights train, its optimizer, its rate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizer.libraries import make_optimizer
from optimizer.schedules import Schedule
from optimizer.settings import PartSettings, schedule_of
from utils.errors import UserError
from utils.optimizer_file import Freezing
from utils.optimizer_names import FINDS_ITS_RATE, MOMENT_BYTES, PARAMETERS

_LAYER = re.compile(r"\bencoder\.layers\.(\d+)\.")


# These measure one distance over all weights; the others treat each weight by itself.
WHOLE = (*FINDS_ITS_RATE, "scalar_dowg")
_GROUP_NUMBERS = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """How the memory of a network under training is kept down, at a price.

    Args:
        bf16_weights: weights, gradients and moments in bf16, with stochastic rounding.
        step_in_backward: each weight steps as soon as its gradient is there, so gradients never all exist.
    """

    bf16_weights: bool = False
    step_in_backward: bool = False


@dataclass(slots=True)
class Part:
    """A network under training.

    Args:
        name: "unet" or "text_encoder".
        parameters: those that train, by name.
        optimizer_name: as in the optimizer file.
        optimizers: one over all parameters; or, to save memory, one for each few of them.
        rate: the full learning rate, to which the schedule's factor applies.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer_name: str
    optimizers: list[Optimizer]
    schedule: Schedule
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory = Memory()

    def lr_at(self, done: int) -> float:
        """The learning rate of the update after `done` others."""
        return self.rate * self.schedule.factor(done)

    def coming_bytes(self) -> int:
        """Memory that the moments will take and do not take yet: all of it before the first update, then none."""
        if any(optimizer.state for optimizer in self.optimizers):
            return 0
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        share = 2 if self.memory.bf16_weights and not self.optimizer_name.endswith("8bit") else 1
        return numbers * MOMENT_BYTES.get(self.optimizer_name, 0) // share

    def weights(self) -> dict[str, Tensor]:
        """The trained weights to sample and to export, by name; live tensors, except where an optimizer averages.

        Schedule-free AdamW takes gradients at one point and answers with another; that one is computed here.
        """
        if self.optimizer_name != "adamw_schedulefree":
            return {name: parameter.detach() for name, parameter in self.parameters.items()}
        z = {p: state["z"] for optimizer in self.optimizers for p, state in optimizer.state.items() if "z" in state}
        beta1 = self.optimizers[0].param_groups[0]["betas"][0]
        answer = {}
        for name, parameter in self.parameters.items():
            live = parameter.detach()
            answer[name] = torch.lerp(live, z[parameter], 1 - 1 / beta1) if parameter in z else live
        return answer


def build_part(
    name: str,
    module: nn.Module,
    settings: PartSettings,
    freezing: Freezing,
    *,
    total_updates: int,
    device_type: str,
    memory: Memory = Memory(),
) -> Part:
    """`module` with gradients asked for where it trains and nowhere else, and an optimizer for those weights alone.

    Args:
        module: on its device already.
        freezing: of the text encoder; `Freezing()` trains everything.
        device_type: "cuda" or "cpu"; decides the optimizer when the settings name none.
        memory: bf16 turns all of `module` to bf16.

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
    check_memory(memory, optimizer_name)
    if memory.bf16_weights:
        nn.Module.to(module, torch.bfloat16)  # Diffusers' own `to` warns of an empty list of exceptions
    optimizers = [
        make_optimizer(optimizer_name, group, settings.lr, settings.parameters)
        for group in _groups(list(parameters.values()), memory)
    ]
    schedule = schedule_of(settings, total_updates)
    options = {"lr": settings.lr, "lr_scheduler": settings.lr_scheduler, **settings.parameters}
    return Part(name, module, parameters, optimizer_name, optimizers, schedule, settings.lr, options, memory)


def check_memory(memory: Memory, optimizer_name: str) -> None:
    """Raise `UserError` if `optimizer_name` needs to see all weights at once and `memory` cuts them up."""
    wish = "step_in_backward" if memory.step_in_backward else "weight_dtype = bf16"
    if (memory.bf16_weights or memory.step_in_backward) and optimizer_name in WHOLE:
        others = ", ".join(name for name in PARAMETERS if name not in WHOLE)
        raise UserError(f"{wish} does not go with {optimizer_name}, which looks at all weights at once; use {others}")


def _groups(parameters: list[nn.Parameter], memory: Memory) -> Iterator[list[nn.Parameter]]:
    """The parameters that step together: all, or so many that fp32 copies of them take little room, or one each."""
    if not memory.bf16_weights and not memory.step_in_backward:
        yield parameters
        return
    group: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in group) + parameter.numel() > _GROUP_NUMBERS
        if group and (memory.step_in_backward or full):
            yield group
            group = []
        group.append(parameter)
    yield group


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
