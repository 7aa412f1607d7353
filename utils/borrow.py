"""Borrowing the live networks: to look at them, or at other weights in them, and give them back as they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import getstate, setstate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@contextmanager
def undisturbed(*modules: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, `modules` are in eval mode and no graph is built; afterwards every mode and global generator is back.

    Samplers of other libraries draw from the generators of torch, numpy and Python; the run must not notice.
    """
    import torch

    kind = torch.device(device)
    modes = [(part, part.training) for module in modules for part in module.modules()]
    python_state = getstate()
    numpy = sys.modules.get("numpy.random")
    numpy_state = None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng(devices=[] if kind.type == "cpu" else [kind]), torch.no_grad():
            for module in modules:
                module.eval()
            yield
    finally:
        for part, training in modes:
            part.training = training
        setstate(python_state)
        if numpy is not None:
            numpy.set_state(numpy_state)


@contextmanager
def weights_swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters named in `tensors` have those values; afterwards the very same storage is back.

    Nothing is copied back and forth: pointers change places, so the return is exact to the bit. Tensors on another
    device or of another dtype are converted for the time being. Raises `KeyError` for a name that `module` lacks.
    """
    parameters = dict(module.named_parameters())
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, tensor in tensors.items():
            parameter = parameters[name]
            assert parameter.shape == tensor.shape, f"{name}: {tuple(tensor.shape)} for {tuple(parameter.shape)}"
            own.append((parameter, parameter.data))
            parameter.data = tensor.detach().to(device=parameter.device, dtype=parameter.dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
