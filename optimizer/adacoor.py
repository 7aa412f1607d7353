"""AdaCoor: coordinate-wise adaptive steps without a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Adacoor(Optimizer):
    """v += eps g^2; p -= eps g / (sqrt(v) + eps). Its only parameter is `eps`; v is kept in bf16.

    `found_inf`, a tensor that is 1 when the gradients are not to be used, skips the step without a word to the host.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], eps: float = 1e-8) -> None:
        super().__init__(params, {"eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients as they are; weights without one stay."""
        assert closure is None
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            eps = group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["v"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                grad = parameter.grad.float()
                if skip is not None:
                    # A zero gradient changes nothing; a product with the flag would keep NaN.
                    grad = torch.where(skip > 0, torch.zeros_like(grad), grad)
                v = state["v"].float().addcmul_(grad, grad, value=eps)
                state["v"].copy_(v)
                parameter.sub_(eps * grad / (v.sqrt() + eps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would give v the dtype of the weights."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["v"] = state["v"].to(torch.bfloat16)
