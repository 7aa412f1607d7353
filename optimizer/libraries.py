"""The optimizers by name, each through its library, imported when it is used."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError
from utils.optimizer_names import PARAMETERS

Parameters = Sequence[nn.Parameter]

# The file's names for the libraries' keywords.
_KEYWORDS = {"epsilon": "eps"}


def make_optimizer(name: str, parameters: Parameters, lr: float, given: Mapping[str, Any]) -> Optimizer:
    """The optimizer `name` over `parameters`, with the library's own defaults for what is not `given`.

    Raises:
        UserError: its library is missing, or it cannot work on this device.
    """
    assert name in PARAMETERS, name
    keywords = {_KEYWORDS.get(key, key): value for key, value in given.items()}
    if "betas" in keywords:
        keywords["betas"] = tuple(keywords["betas"])
    if "lr" in PARAMETERS[name]:
        # Libraries refuse a rate of 0 at first sight; every update sets the rate of the day.
        keywords["lr"] = lr if lr > 0 else 1.0
    return _MAKERS[name](parameters, keywords)


def _library(module: str, package: str, optimizer: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"the optimizer {optimizer} needs the package {package} ({error}); "
            f"install it with: pip install {package}; or name another optimizer in the optimizer file"
        ) from error


def _adamw(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **keywords)


def _adafactor(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    return torch.optim.Adafactor(parameters, **keywords)


def _adacoor(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    from optimizer.adacoor import Adacoor

    return Adacoor(parameters, **keywords)


def _bitsandbytes(name: str, class_name: str) -> Callable[[Parameters, dict[str, Any]], Optimizer]:
    def make(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
        optimizers = _library("bitsandbytes.optim", "bitsandbytes", name)
        base = getattr(optimizers, class_name)

        class Unwaiting(base):  # type: ignore[misc, valid-type]
            """The library's step waits for the GPU after every tensor; the same updates need no waiting."""

            @torch.no_grad()
            def step(self, closure: Callable[[], float] | None = None) -> None:
                assert closure is None
                for index, group in enumerate(self.param_groups):
                    for place, parameter in enumerate(group["params"]):
                        if parameter.grad is None:
                            continue
                        if not self.state[parameter]:
                            self.init_state(group, parameter, index, place)
                        self.update_step(group, parameter, index, place)

        made: Optimizer = Unwaiting(parameters, **keywords)
        return made

    return make


def _coordinate_dowg(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    made: Optimizer = _library("dowg", "dowg", "coordinate_dowg").CoordinateDoWG(parameters, **keywords)
    for parameter in parameters:
        # Left to itself the library takes the weights themselves for where they started, so nothing ever moves away.
        made.state[parameter]["x0"] = parameter.detach().to(torch.float32, copy=True)
    return made


def _scalar_dowg(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    if any(parameter.device.type != "cpu" for parameter in parameters):
        raise UserError("the package dowg computes scalar_dowg on the CPU only; use coordinate_dowg on a GPU")
    base = _library("dowg", "dowg", "scalar_dowg").ScalarDoWG

    class Stepping(base):  # type: ignore[misc, valid-type]
        """The library only looks at the gradients when it is given a closure, and wants one for every weight."""

        def step(self, closure: Callable[[], float] | None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            super().step(lambda: 0.0)

    made: Optimizer = Stepping(parameters, **keywords)
    return made


def _schedulefree(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
    made: Optimizer = _library("schedulefree", "schedulefree", "adamw_schedulefree").AdamWScheduleFree(
        parameters, **keywords
    )
    made.train()  # type: ignore[attr-defined]
    return made


def _from(module: str, package: str, name: str, class_name: str) -> Callable[[Parameters, dict[str, Any]], Optimizer]:
    def make(parameters: Parameters, keywords: dict[str, Any]) -> Optimizer:
        library = _library(module, package, name)
        with contextlib.redirect_stdout(io.StringIO()):  # some announce their weight decay there
            made: Optimizer = getattr(library, class_name)(parameters, **keywords)
        return made

    return make


_MAKERS: dict[str, Callable[[Parameters, dict[str, Any]], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _bitsandbytes("adamw8bit", "AdamW8bit"),
    "lion": _from("lion_pytorch", "lion-pytorch", "lion", "Lion"),
    "lion8bit": _bitsandbytes("lion8bit", "Lion8bit"),
    "prodigy": _from("prodigyopt", "prodigyopt", "prodigy", "Prodigy"),
    "dadapt_adam": _from("dadaptation", "dadaptation", "dadapt_adam", "DAdaptAdam"),
    "dadapt_lion": _from("dadaptation", "dadaptation", "dadapt_lion", "DAdaptLion"),
    "dadapt_sgd": _from("dadaptation", "dadaptation", "dadapt_sgd", "DAdaptSGD"),
    "dadapt_adan": _from("dadaptation", "dadaptation", "dadapt_adan", "DAdaptAdan"),
    "adafactor": _adafactor,
    "adamw_schedulefree": _schedulefree,
    "coordinate_dowg": _coordinate_dowg,
    "scalar_dowg": _scalar_dowg,
    "adacoor": _adacoor,
}
assert set(_MAKERS) == set(PARAMETERS)
