"""The optimizer file: which optimizer, rate and schedule each network gets, and what of the text encoder is trained."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem, ProblemsError
from utils.optimizer_names import COMMON, PARAMETERS, SCHEDULES, betas_of
from utils.options import read_json_object
from utils.schema import check_value, option, option_fields

DEFAULT_FILE = "optimizer.json"


@dataclass(frozen=True, slots=True)
class PartValues:
    """What the file says of a network; `None` is "not given"."""

    optimizer: str | None = option(None, "its name; not given: adamw8bit with CUDA, adamw otherwise")
    lr: float | None = option(None, "learning rate", low=0)
    lr_scheduler: str | None = option(None, "shape of the rate over the run", choices=SCHEDULES)
    lr_decay_steps: int | None = option(None, "updates of the decay; not given: 1.5 times the run", low=1)
    lr_warmup_steps: int | None = option(None, "updates of the warmup; not given: 2 % of the decay", low=0)
    lr_cycles: int | None = option(None, "times that cosine_with_restarts comes down; not given: 3", low=1)
    lr_power: float | None = option(None, "power of the polynomial schedule; not given: 2", low=0)
    betas: Any = option(None, "decay rates of the moments, two numbers (dadapt_adan: three)")
    epsilon: float | None = option(None, "added where a division could be by zero", low=0)
    weight_decay: float | None = option(None, "share of the rate by which weights shrink", low=0)
    d0: float | None = option(None, "first estimate of the distance to the solution", low=1e-30)
    decouple: bool | None = option(None, "weight decay apart from the gradient, as in AdamW")
    momentum: float | None = option(None, "of dadapt_sgd", low=0, high=1)
    no_prox: bool | None = option(None, "how dadapt_adan applies weight decay")
    growth_rate: float | None = option(None, "most that the estimate grows by in an update", low=1)
    use_bias_correction: bool | None = option(None, "Adam's correction of the first moments")
    safeguard_warmup: bool | None = option(None, "keep the warmup out of the estimate")


@dataclass(frozen=True, slots=True)
class Freezing:
    """What of the text encoder stays as it is; `None` is "not given"."""

    unfreeze_last_n_layers: int | None = option(None, "only so many layers train, from the end", low=0)
    freeze_embeddings: bool | None = option(None, "token and position embeddings; not given: only with the above")
    freeze_final_layer_norm: bool | None = option(None, "the last norm; not given: it trains")


@dataclass(frozen=True, slots=True)
class FileValues:
    """The top level of the file."""

    text_encoder_lr_scale: float = option(0.5, "rate of a text encoder without one of its own, over the UNet's", low=0)
    apply_grad_scaler_step_tweaks: bool = option(True, "fp16: the loss scale grows more slowly as the run goes on")
    log_grad_norm: bool = option(True, "log the gradient norms")


@dataclass(frozen=True, slots=True)
class OptimizerFile:
    """A checked optimizer file.

    Args:
        notes: lines for the log.
    """

    base: PartValues = dataclasses.field(default_factory=PartValues)
    text_encoder: PartValues = dataclasses.field(default_factory=PartValues)
    freezing: Freezing = dataclasses.field(default_factory=Freezing)
    values: FileValues = dataclasses.field(default_factory=FileValues)
    notes: tuple[str, ...] = ()


SECTIONS: dict[str, type] = {
    "base": PartValues,
    "text_encoder_overrides": PartValues,
    "text_encoder_freezing": Freezing,
}


def load_optimizer_file(path: str | Path) -> OptimizerFile:
    """The checked optimizer file at `path`; without one at the default place, the defaults and a note that says so.

    Raises:
        ProblemsError: with every mistake in the file, or because a file that was named is not there.
    """
    path = Path(path)
    if str(path) == DEFAULT_FILE and not path.exists():
        return OptimizerFile(notes=(f"no {path}: the default optimizer and rates are used; see docs/optimizers.md",))
    if not os.path.exists(path):  # noqa: PTH110  pathlib raises for a name that is too long
        remedy = "no such file; name another one with optimizer_config, or leave that out for the defaults"
        raise ProblemsError([Problem(str(path), "", None, remedy)])
    return parse_optimizer_file(read_json_object(path), str(path))


def parse_optimizer_file(raw: Mapping[str, Any], where: str) -> OptimizerFile:
    """The checked optimizer file from its JSON object; `where` names it in messages.

    Raises:
        ProblemsError: with every mistake.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    top, sections = _split(raw, where, problems)
    values = _read(FileValues, top, where, "", problems)
    read: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        read[name] = _read(kind, sections.get(name, {}), where, name, problems)
        if kind is PartValues:
            _check_betas(read[name].betas, where, name, problems)
            _check_optimizer(read[name].optimizer, where, name, problems)
    if not problems:
        for name in ("base", "text_encoder_overrides"):
            optimizer = read[name].optimizer
            if name == "text_encoder_overrides" and optimizer is None:
                optimizer = read["base"].optimizer
            _check_parameters(read[name], optimizer or "adamw", where, name, problems, notes)
    if problems:
        raise ProblemsError(problems)
    overrides, freezing = read["text_encoder_overrides"], read["text_encoder_freezing"]
    return OptimizerFile(read["base"], overrides, freezing, values, tuple(notes))


def _split(
    raw: Mapping[str, Any], where: str, problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    top: dict[str, Any] = {}
    sections: dict[str, Mapping[str, Any]] = {}
    for name, value in raw.items():
        if name == "doc":
            continue
        if name not in SECTIONS:
            top[name] = value
        elif isinstance(value, Mapping):
            sections[name] = value
        elif value is not None:
            problems.append(Problem(where, name, value, "must be an object: { ... }"))
    return top, sections


def _read(kind: type, values: Mapping[str, Any], where: str, section: str, problems: list[Problem]) -> Any:
    fields = option_fields(kind)
    names = list(fields) if section else [*fields, *SECTIONS]
    good = {}
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if name not in fields:
            problems.append(Problem(where, key, value, _unknown(name, names)))
        elif value is not None:
            good[name], problem = check_value(fields[name], value, where)
            if problem is not None:
                problems.append(dataclasses.replace(problem, key=key))
    return kind(**good)


def _unknown(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown; did you mean {match[0]}?" if match else f"unknown; it must be one of {', '.join(known)}"


def _check_betas(betas: Any, where: str, section: str, problems: list[Problem]) -> None:
    if betas is None:
        return
    numbers = isinstance(betas, list) and all(isinstance(b, int | float) and not isinstance(b, bool) for b in betas)
    if not numbers or len(betas) not in (2, 3) or not all(0 <= b < 1 for b in betas):
        problems.append(Problem(where, f"{section}.betas", betas, "must be two numbers, each at least 0 and below 1"))


def _check_optimizer(name: str | None, where: str, section: str, problems: list[Problem]) -> None:
    if name is not None and name not in PARAMETERS:
        remedy = f"unknown optimizer; it must be one of {', '.join(PARAMETERS)}"
        problems.append(Problem(where, f"{section}.optimizer", name, remedy))


def _check_parameters(
    values: PartValues, optimizer: str, where: str, section: str, problems: list[Problem], notes: list[str]
) -> None:
    """Parameters that `optimizer` does not take: an error, or a note for those that every old file carries."""
    for name in given_parameters(values):
        if name in PARAMETERS[optimizer]:
            continue
        remedy = f"{optimizer} does not take it; it takes {', '.join(PARAMETERS[optimizer])}"
        if name in COMMON:
            notes.append(f"{where}: {section}.{name} has no effect: {remedy}")
        else:
            problems.append(Problem(where, f"{section}.{name}", getattr(values, name), remedy))
    count = betas_of(optimizer)
    if values.betas is not None and len(values.betas) != count:
        words = "three" if count == 3 else "two"
        problems.append(Problem(where, f"{section}.betas", values.betas, f"must be {words} numbers for {optimizer}"))


def given_parameters(values: PartValues) -> dict[str, Any]:
    """The parameters (not the schedule) that are given."""
    names = sorted({name for parameters in PARAMETERS.values() for name in parameters})
    return {name: getattr(values, name) for name in names if getattr(values, name) is not None}
