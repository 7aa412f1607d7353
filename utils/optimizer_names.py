"""The optimizers and schedules by name, with the parameters that each takes and its usual rate."""

from __future__ import annotations

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

_ADAM = ("lr", "betas", "epsilon", "weight_decay")

# The parameters that each optimizer takes, besides the schedule's; no "lr" where there is no rate to set.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "lion": ("lr", "betas", "weight_decay"),
    "lion8bit": ("lr", "betas", "weight_decay"),
    "prodigy": (*_ADAM, "d0", "decouple", "growth_rate", "use_bias_correction", "safeguard_warmup"),
    "dadapt_adam": (*_ADAM, "d0", "decouple", "growth_rate", "use_bias_correction"),
    "dadapt_lion": ("lr", "betas", "weight_decay", "d0"),
    "dadapt_sgd": ("lr", "weight_decay", "momentum", "d0", "growth_rate"),
    "dadapt_adan": (*_ADAM, "d0", "no_prox", "growth_rate"),
    "adafactor": ("lr", "weight_decay"),
    "adamw_schedulefree": _ADAM,
    "coordinate_dowg": ("epsilon",),
    "scalar_dowg": ("epsilon",),
    "adacoor": ("epsilon",),
}
# Values that every old file carries, whichever optimizer it names: left alone with a warning where they do not apply.
COMMON = _ADAM
DEFAULT_RATES = {
    "lion": 1e-7,
    "lion8bit": 1e-7,
    "prodigy": 1.0,
    "dadapt_adam": 1.0,
    "dadapt_lion": 1.0,
    "dadapt_sgd": 1.0,
    "dadapt_adan": 1.0,
    "adafactor": 1e-5,
}
DEFAULT_RATE = 1e-6
# The rates of these are factors on the one they find; a lower one is another optimizer's, left standing.
FINDS_ITS_RATE = ("prodigy", "dadapt_adam", "dadapt_lion", "dadapt_sgd", "dadapt_adan")
LOWEST_FACTOR = 1e-4
# Bytes that each keeps for a weight, where that is a plain multiple; the others find out for themselves.
MOMENT_BYTES = {"adamw": 8, "lion": 4, "adamw8bit": 2, "lion8bit": 1}


def betas_of(optimizer: str) -> int:
    """How many decay rates `optimizer` keeps its moments by."""
    return 3 if optimizer == "dadapt_adan" else 2
