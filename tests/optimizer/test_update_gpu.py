"""The update on a GPU: silent where it can be, whole where it is not, the same as the libraries.

With GPU_TESTS_DEVICE=cpu the same bodies run on the CPU, as a test of the tests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.build import Memory, Part, build_part
from optimizer.ema import Ema
from optimizer.in_backward import UpdaterInBackward
from optimizer.loss_scale import LossScale
from optimizer.stepping import stochastic_round
from optimizer.update import Updater
from tests.optimizer.parts import settings, small_network
from utils.optimizer_file import Freezing

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
missing = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing, reason="needs CUDA")]


def part_on_gpu(base: dict[str, Any], memory: Memory | None = None) -> Part:
    memory = Memory() if memory is None else memory
    network = small_network().to(DEVICE)
    return build_part("unet", network, settings(base), Freezing(), total_updates=20, device_type=DEVICE, memory=memory)


def losses(part: Part, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    pictures = torch.randn(4, 64, generator=generator).to(DEVICE)
    answer: Tensor = part.module(pictures.to(next(part.module.parameters()).dtype)).float()
    return (answer - 3 * pictures[:, :8]).square().mean(1)


def run(part: Part, updater: Updater, updates: range, bad: int | None = None) -> None:
    ones = torch.ones(4, device=DEVICE)
    for done in updates:
        loss = losses(part, done)
        updater.backward(loss * float("nan") if done == bad else loss, ones, 4, done=done, last=True)
        updater.step(done)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, the host may not wait for the GPU."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fp16", [False, True])
def test_adamw_never_waits_for_the_gpu(fp16: bool) -> None:
    part = part_on_gpu({"optimizer": "adamw", "lr": 1e-3})
    updater = Updater([part], seed=0, clip_grad_norm=1.0, loss_scale=LossScale(DEVICE) if fp16 else None)
    ema = Ema({"unet": part.weights()}, decay=0.9, interval=1, device=DEVICE)
    run(part, updater, range(2))
    batches = [losses(part, done) for done in range(2, 3)]
    ones = torch.ones(4, device=DEVICE)
    with waiting_is_an_error():
        for done, loss in enumerate(batches, start=2):
            updater.backward(loss, ones, 4, done=done, last=True)
            updater.step(done)
            ema.update(done + 1, {"unet": part.weights()})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adacoor", "adamw_schedulefree", "prodigy"])
def test_a_bad_update_reaches_nothing(optimizer: str) -> None:
    part = part_on_gpu({"optimizer": optimizer})
    updater = Updater([part], seed=0, clip_grad_norm=1.0)
    run(part, updater, range(2))
    before = {name: parameter.detach().clone() for name, parameter in part.parameters.items()}
    run(part, updater, range(2, 3), bad=2)
    assert updater.skipped() == (1, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in part.parameters.items())
    run(part, updater, range(3, 4))
    assert not any(torch.equal(parameter, before[name]) for name, parameter in part.parameters.items())


def test_eight_bit_updates_without_waiting_are_the_library_s() -> None:
    import bitsandbytes

    part, twin = part_on_gpu({"optimizer": "adamw8bit", "lr": 1e-3}), part_on_gpu({"optimizer": "adamw"})
    optimizer = bitsandbytes.optim.AdamW8bit(list(twin.module.parameters()), lr=1e-3)
    run(part, Updater([part], seed=0), range(10))
    for done in range(10):
        optimizer.zero_grad()
        (losses(twin, done).sum() / 4).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(torch.equal(parameter, twin.parameters[name]) for name, parameter in part.parameters.items())


def test_rounding_and_steps_inside_backward() -> None:
    values = torch.full((100_000,), 1 + 2**-10, device=DEVICE)
    rounded = stochastic_round(values, torch.Generator(DEVICE).manual_seed(0)).double()
    assert abs(rounded.mean().item() - (1 + 2**-10)) < 4 * rounded.std().item() / 100_000**0.5
    memory = Memory(bf16_weights=True, step_in_backward=True)
    part = part_on_gpu({"optimizer": "adamw8bit", "lr": 1e-3}, memory)
    updater = UpdaterInBackward([part], seed=0)
    first, last = losses(part, 0).mean(), losses(part, 0).mean()
    for done in range(30):
        updater.backward(losses(part, 0), torch.ones(4, device=DEVICE), 4, done=done, last=True)
        last = updater.step(done).loss
    assert last < 0.98 * first


def test_an_average_on_the_cpu_follows_weights_on_the_gpu() -> None:
    part = part_on_gpu({"optimizer": "adamw", "lr": 1e-2})
    there = Ema({"unet": part.weights()}, decay=0.5, interval=1, device=DEVICE)
    here = Ema({"unet": part.weights()}, decay=0.5, interval=1, device="cpu")
    updater = Updater([part], seed=0)
    for done in range(4):
        run(part, updater, range(done, done + 1))
        for ema in (there, here):
            ema.update(done + 1, {"unet": part.weights()})
    for name, average in here.tensors("unet").items():
        assert average.device.type == "cpu"
        assert torch.allclose(there.tensors("unet")[name].cpu(), average, atol=1e-6)
