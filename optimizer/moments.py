"""Saved optimizer state: what goes on, which options of today replace its own, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimizer.build import Part
from utils.errors import UserError

# What changes with every update goes on as saved: the rate, and what optimizers that find their own keep beside it.
_PROGRESS = frozenset(
    """params lr k d d_max d_hat d_numerator d_denom numerator_weighted gsq_weighted g0_norm
    lr_max weight_sum scheduled_lr train_mode""".split()
)


def part_state(part: Part) -> dict[str, Any]:
    """The optimizers' state of `part` with what it belongs to; tensors are the live ones."""
    return {
        "optimizer": part.optimizer_name,
        "names": list(part.parameters),
        "options": {name: _plain(value) for name, value in part.options.items()},
        "states": [optimizer.state_dict() for optimizer in part.optimizers],
    }


def load_part_state(part: Part, saved: Mapping[str, Any]) -> list[str]:
    """Take over the moments of `saved` and keep the options of today; a line for each option that is another now.

    Raises:
        UserError: the state belongs to another optimizer or to other weights.
    """
    label = part.name.replace("_", " ")
    if saved["optimizer"] != part.optimizer_name:
        raise UserError(
            f"the saved state of the {label} is {saved['optimizer']}'s, this run uses {part.optimizer_name}; "
            f"name {saved['optimizer']} in the optimizer file, or use --resume_mode weights"
        )
    if saved["names"] != list(part.parameters):
        raise UserError(
            f"the saved state trains {len(saved['names'])} weights of the {label}, this run {len(part.parameters)} or "
            f"others; set text_encoder_freezing as it was, or use --resume_mode weights"
        )
    if len(saved["states"]) != len(part.optimizers):
        raise UserError(
            f"the saved state of the {label} was made with another weight_dtype or step_in_backward; "
            f"set them as they were, or use --resume_mode weights"
        )
    for optimizer, state in zip(part.optimizers, saved["states"], strict=True):
        today = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, options in zip(optimizer.param_groups, today, strict=True):
            group.update({name: value for name, value in options.items() if name not in _PROGRESS})
    old, new = saved["options"], {name: _plain(value) for name, value in part.options.items()}
    names = [name for name in [*old, *(name for name in new if name not in old)] if old.get(name) != new.get(name)]
    return [f"{label}: {name} was {_word(old.get(name))}, is {_word(new.get(name))} from now on" for name in names]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    return "not given" if value is None else str(value)
