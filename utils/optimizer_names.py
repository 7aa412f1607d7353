"""The optimizers and schedules by name, with the parameters that each takes and its usual rate."""

from __future__ import annotations

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

# The parameters that each optimizer takes, besides the schedule's; "lr" is missing where it finds its own.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "adamw": ("lr", "betas", "epsilon", "weight_decay"),
    "adamw8bit": ("lr", "betas", "epsilon", "weight_decay"),
    "lion": ("lr", "betas", "weight_decay"),
    "lion8bit": ("lr", "betas", "weight_decay"),
    "prodigy": (
        "lr",
        "betas",
        "epsilon",
        "weight_decay",
        "d0",
        "decouple",
        "growth_rate",
        "use_bias_correction",
        "safeguard_warmup",
    ),
    "dadapt_adam": (
        "lr",
        "betas",
        "epsilon",
        "weight_decay",
        "d0",
        "decouple",
        "growth_rate",
        "use_bias_correction",
    ),
    "dadapt_lion": ("lr", "betas", "weight_decay", "d0"),
    "dadapt_sgd": ("lr", "weight_decay", "momentum", "d0", "growth_rate"),
    "dadapt_adan": ("lr", "betas", "epsilon", "weight_decay", "d0", "no_prox", "growth_rate"),
    "adafactor": ("lr", "weight_decay"),
    "adamw_schedulefree": ("lr", "betas", "epsilon", "weight_decay"),
    "coordinate_dowg": ("epsilon",),
    "scalar_dowg": ("epsilon",),
    "adacoor": ("epsilon",),
}
# Values that every old file carries, whichever optimizer it names: left alone with a warning where they do not apply.
COMMON = ("lr", "betas", "epsilon", "weight_decay")
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
# Rates of these are factors on the one they find; below it, a rate of another optimizer was left standing.
FINDS_ITS_RATE = ("prodigy", "dadapt_adam", "dadapt_lion", "dadapt_sgd", "dadapt_adan")
LOWEST_FACTOR = 1e-4
