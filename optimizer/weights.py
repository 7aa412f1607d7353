"""How much the loss of each timestep counts: one table for the run."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizer.diffusion import signal_to_noise
from utils.config import LossOptions
from utils.errors import UserError

SOFT_MIN_SNR_GAMMA = 5.0
# Only zero terminal SNR goes below it (SD's own schedule ends at 0.0047); without it the last weight is infinite.
DEBIASED_SNR_FLOOR = 1e-3


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, options: LossOptions) -> Tensor:
    """The weight of the loss at each timestep, float32 (T,), for the schedule as trained (after any rescaling).

    Written for the error of the denoised latents x0, the weights are
    min(SNR, g) (min-SNR, arXiv 2303.09556), SNR g / (SNR + g) (soft min-SNR, arXiv 2401.11605) and
    sqrt(SNR) (debiased estimation, arXiv 2310.08442). The error of epsilon is SNR times that of x0, the error of v
    is SNR + 1 times that of x0, so their tables are divided by it.

    Raises:
        UserError: the options contradict each other, or leave no timestep any weight.
    """
    gamma, weighting = options.min_snr_gamma, options.loss_weighting
    if gamma is not None and gamma <= 0:
        raise UserError(f"min_snr_gamma = {gamma:g} leaves the loss no weight at all; use 5, or leave it out")
    if weighting == "debiased" and gamma is not None:
        raise UserError("loss_weighting = debiased and min_snr_gamma both weigh the timesteps; choose one of them")
    snr = signal_to_noise(alphas_cumprod.double().cpu())
    if weighting == "debiased":
        snr = snr.clamp(min=DEBIASED_SNR_FLOOR)
        by_snr = snr.rsqrt()
    elif weighting == "soft_min_snr":
        soft = SOFT_MIN_SNR_GAMMA if gamma is None else gamma
        by_snr = soft / (snr + soft)
    elif gamma is not None:
        # min(SNR, g) / SNR, in the form that holds at SNR = 0, too.
        by_snr = (gamma / snr).clamp(max=1.0)
    else:
        return torch.ones(len(snr), dtype=torch.float32)
    # `by_snr` is the weight over SNR, which for epsilon is all.
    per_prediction = {"epsilon": by_snr, "v_prediction": by_snr * snr / (snr + 1), "sample": by_snr * snr}
    return per_prediction[prediction_type].to(torch.float32)
