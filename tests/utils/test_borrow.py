"""Networks are given back as they were, to the bit, with every generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from utils.borrow import undisturbed, weights_swapped


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


def look_and_break(net: nn.Module) -> None:
    with undisturbed(net):
        assert not any(part.training for part in net.modules())
        assert not net(torch.ones(1, 2)).requires_grad
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002
        raise RuntimeError("broken")


def test_modes_graphs_and_generators_are_restored_even_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2))
    net.train()
    net[1].eval()  # a part that had a mode of its own
    before = generators()
    with pytest.raises(RuntimeError, match="broken"):
        look_and_break(net)
    assert [part.training for part in net] == [True, False, True]
    assert torch.is_grad_enabled()
    assert generators() == before


def test_other_weights_for_a_while() -> None:
    net = nn.Linear(3, 3)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    storages = [parameter.data_ptr() for parameter in net.parameters()]
    with weights_swapped(net, {"weight": torch.eye(3, dtype=torch.float64)}):
        assert torch.equal(net.weight, torch.eye(3))
        assert torch.equal(net.bias, own["bias"])
    assert [parameter.data_ptr() for parameter in net.parameters()] == storages
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


def test_a_name_that_is_not_there_changes_nothing() -> None:
    net = nn.Linear(2, 2)
    own = net.weight.clone()
    with pytest.raises(KeyError), weights_swapped(net, {"weight": torch.zeros(2, 2), "wait": torch.zeros(2)}):
        pass
    assert torch.equal(net.weight, own)
