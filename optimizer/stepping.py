"""One step of one optimizer: its rate, the flag that forbids it, and weights kept in bf16."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether `optimizer` can be told on the device that its gradients are not to be used."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_optimizer(optimizer: Optimizer, rate: float, found_inf: Tensor, rounding: Generator | None) -> None:
    """Step once at `rate`, unless `found_inf` is 1 and the optimizer can be told so.

    Args:
        found_inf: float tensor on the device of the weights.
        rounding: for weights in bf16, the stream of their stochastic rounding.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    told = takes_found_inf(optimizer)
    if told:
        optimizer.grad_scale, optimizer.found_inf = None, found_inf  # type: ignore[attr-defined]
    if rounding is None:
        optimizer.step()
    else:
        _rounded_step(optimizer, rounding)
    if told:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _rounded_step(optimizer: Optimizer, generator: Generator) -> None:
    """A step in fp32, of which weights and moments keep bf16: an update below half a bf16 step survives on average."""
    kept = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        assert parameter.dtype == torch.bfloat16, parameter.dtype
        kept.append((parameter, parameter.data))
        gradient, parameter.grad = parameter.grad.float(), None
        parameter.data = parameter.data.float()
        parameter.grad = gradient
        _convert_moments(optimizer, parameter, torch.bfloat16, None)
    optimizer.step()
    for parameter, data in kept:
        data.copy_(stochastic_round(parameter.data, generator))
        parameter.grad = None
        _convert_moments(optimizer, parameter, torch.float32, generator)
        parameter.data = data


def _convert_moments(optimizer: Optimizer, parameter: Tensor, dtype: torch.dtype, generator: Generator | None) -> None:
    """Turn what `optimizer` keeps for each number of `parameter` from `dtype` to the other one, of bf16 and fp32."""
    state = optimizer.state[parameter]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == dtype and value.shape == parameter.shape:
            state[name] = value.float() if generator is None else stochastic_round(value, generator)


def stochastic_round(values: Tensor, generator: Generator) -> Tensor:
    """`values` (fp32) in bf16, each rounded up or down with odds that make the result right on average.

    bf16 is the upper half of fp32: a random number added to the lower half carries into the upper one as often as the
    lower half is large. What bf16 can hold stays as it is. (arXiv 2010.06192)
    """
    assert values.dtype == torch.float32, values.dtype
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
