"""The schedulers that turn noise into samples, by the names that sample files use."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from utils.models import ZERO_SNR_SCHEDULERS, Models, noise_scheduler

if TYPE_CHECKING:
    from torch import Tensor

# How far a guided prediction is brought back to the spread of the unguided one (arXiv 2305.08891, section 3.4).
GUIDANCE_RESCALE = 0.7
_SMALLEST_ALPHA = 2**-24

_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


def sample_scheduler(models: Models, name: str, *, zero_terminal_snr: bool = False) -> Any:
    """A fresh Diffusers scheduler `name` (`_k`: with the noise levels of Karras, arXiv 2206.00364) for `models`.

    It has the model's own schedule and prediction type. With `zero_terminal_snr`, or when the model is marked so, the
    betas are rescaled and the timesteps trail, so that sampling begins at pure noise (arXiv 2305.08891).
    """
    import diffusers

    class_name, settings = _CLASSES[name.removesuffix("_k")]
    cls = getattr(diffusers, class_name)
    config = {key: value for key, value in models.scheduler_config.items() if not key.startswith("_")}
    # What every Stable Diffusion pipeline insists on, whatever the folder says.
    config |= {"prediction_type": models.prediction_type, "clip_sample": False, "steps_offset": 1, **settings}
    if class_name != "DDIMScheduler":
        config["thresholding"] = False
    if name.endswith("_k"):
        config["use_karras_sigmas"] = True
    if zero_terminal_snr or models.zero_terminal_snr:
        config |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        # Those that divide by the last alpha to turn a predicted noise into a picture cannot have it at 0 either.
        divides = models.prediction_type == "epsilon" and class_name in ("DDIMScheduler", "DDPMScheduler")
        if divides or class_name not in ZERO_SNR_SCHEDULERS:
            config["rescale_betas_zero_snr"] = False
            config["trained_betas"] = _nearly_zero_snr_betas(models).tolist()
    known = set(inspect.signature(cls).parameters)
    return cls.from_config({key: value for key, value in config.items() if key in known})


def _nearly_zero_snr_betas(models: Models) -> Tensor:
    """The rescaled betas for classes that cannot do without a last alpha: as small as Diffusers makes it elsewhere."""
    alphas = noise_scheduler(models, zero_terminal_snr=True).alphas_cumprod.double().clone()
    alphas[-1] = _SMALLEST_ALPHA
    betas: Tensor = 1 - alphas / alphas.roll(1)
    betas[0] = 1 - alphas[0]
    return betas
