"""Loss weights over all timesteps against their closed forms, computed here another way round."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optimizer.weights import loss_weights
from tests.optimizer.parts import alphas_cumprod
from utils.config import LossOptions
from utils.errors import UserError


def closed_form(alpha: float, prediction_type: str, options: LossOptions) -> float:
    """The weight at one timestep, from the weight of the error of x0 and the error of the prediction in those units."""
    sigma2 = (1 - alpha) / alpha if alpha > 0 else math.inf  # noise over signal
    gamma = options.min_snr_gamma
    if options.loss_weighting == "debiased":
        sigma2 = min(sigma2, 1000.0)
    per_epsilon = {
        "none": 1.0 if gamma is None else min(1.0, gamma * sigma2),
        "soft_min_snr": (5.0 if gamma is None else gamma) / ((5.0 if gamma is None else gamma) + 1 / sigma2),
        "debiased": math.sqrt(sigma2),
    }[options.loss_weighting]
    if gamma is None and options.loss_weighting == "none":
        return 1.0
    # |eps error|^2 = |x0 error|^2 / sigma2; |v error|^2 = |x0 error|^2 (1 + 1 / sigma2)
    return {
        "epsilon": per_epsilon,
        "sample": per_epsilon / sigma2,
        "v_prediction": per_epsilon / (1 + sigma2),
    }[prediction_type]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_snr_gamma": 5.0},
        {"min_snr_gamma": 1.0},
        {"min_snr_gamma": 20.0},
        {"loss_weighting": "soft_min_snr"},
        {"loss_weighting": "soft_min_snr", "min_snr_gamma": 2.0},
        {"loss_weighting": "debiased"},
    ],
)
def test_table_is_the_closed_form(options: dict[str, Any], prediction_type: str, zero_snr: bool) -> None:
    table = alphas_cumprod(zero_snr=zero_snr)
    weights = loss_weights(table, prediction_type, LossOptions(**options))
    expected = [closed_form(alpha, prediction_type, LossOptions(**options)) for alpha in table.double().tolist()]
    assert weights.shape == (1000,)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert torch.allclose(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9)


def test_min_snr_is_the_formula_of_diffusers_examples() -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(scheduler, torch.arange(1000))
    clipped = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    options = LossOptions(min_snr_gamma=5.0)
    assert torch.allclose(loss_weights(alphas_cumprod(), "epsilon", options), clipped / snr, rtol=1e-4)
    assert torch.allclose(loss_weights(alphas_cumprod(), "v_prediction", options), clipped / (snr + 1), rtol=1e-4)


def test_known_values_that_other_programs_got_wrong() -> None:
    options = LossOptions(min_snr_gamma=5.0)
    at_900 = loss_weights(alphas_cumprod(), "v_prediction", options)[900].item()
    after_rescale = loss_weights(alphas_cumprod(zero_snr=True), "v_prediction", options)[900].item()
    assert round(at_900, 4) == 0.0142
    assert round(after_rescale, 4) == 0.0030


@pytest.mark.parametrize("options", [{"min_snr_gamma": 0.0}, {"loss_weighting": "debiased", "min_snr_gamma": 5.0}])
def test_weights_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="min_snr_gamma"):
        loss_weights(alphas_cumprod(), "epsilon", LossOptions(**options))
