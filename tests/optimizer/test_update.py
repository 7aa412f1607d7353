"""The update: means over images, norms, clipping, bad gradients, and silence towards the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optimizer.build import Part
from optimizer.loss_scale import LossScale
from optimizer.update import Updater
from tests.optimizer.parts import copies, losses, small_part
from utils.errors import UserError


def run(part: Part, updater: Updater, updates: range) -> None:
    for done in updates:
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        updater.step(done)


def same(part: Part, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(parameter, weights[name]) for name, parameter in part.parameters.items())


def gradients(*, cuts: list[int], scales: Tensor) -> dict[str, Tensor]:
    """The gradients of an update of 4 images, cut into micro-batches at `cuts`."""
    part = small_part({})
    updater = Updater([part], seed=0)
    everything = losses(part, 0)
    start = 0
    for stop in cuts:
        loss = losses(part, 0)[start:stop]
        updater.backward(loss, scales[start:stop], 4, done=0, last=stop == 4)
        start = stop
    assert everything.shape == (4,)
    return {name: parameter.grad.clone() for name, parameter in part.parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("cuts", [[2, 4], [1, 2, 3, 4], [1, 4]])
def test_an_update_is_a_mean_over_its_images_however_it_is_cut(cuts: list[int]) -> None:
    scales = torch.tensor([1.0, 0.5, 0.0, 2.0])
    whole, cut = gradients(cuts=[4], scales=scales), gradients(cuts=cuts, scales=scales)
    for name, gradient in whole.items():
        assert torch.linalg.vector_norm(cut[name] - gradient) < 1e-6 * torch.linalg.vector_norm(gradient)
    part = small_part({})
    ((losses(part, 0) * scales).sum() / 4).backward()  # type: ignore[no-untyped-call]
    for name, parameter in part.parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(whole[name], parameter.grad, rtol=1e-6, atol=1e-8)


def test_loss_of_the_result_is_the_mean_of_the_update() -> None:
    part = small_part({})
    updater = Updater([part], seed=0)
    scales = torch.tensor([1.0, 0.5, 0.0, 2.0])
    expected = (losses(part, 0).detach() * scales).mean()
    for start in (0, 2):
        updater.backward(losses(part, 0)[start : start + 2], scales[start : start + 2], 4, done=0, last=start == 2)
    first = updater.step(0)
    assert torch.allclose(first.loss, expected)
    updater.backward(losses(part, 1), torch.ones(4), 4, done=1, last=True)
    assert torch.allclose(first.loss, expected), "a result keeps its numbers"


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clipping_and_norms_are_torch_s(limit: float) -> None:
    part, twin = small_part({"lr": 1e-2}), small_part({"lr": 1e-2})
    updater = Updater([part], seed=0, clip_grad_norm=limit)
    optimizer = torch.optim.AdamW(list(twin.parameters.values()), lr=1e-2, fused=True)
    for done in range(5):
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        result = updater.step(done)
        optimizer.zero_grad()
        (losses(twin, done).sum() / 4).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(twin.parameters.values()), limit, foreach=True)
        after = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters.values() if p.grad is not None])
        optimizer.step()
        assert torch.equal(result.grad_norms["unet"], norm)
        assert torch.allclose(result.clipped_norms["unet"], after)
        assert (result.clipped_norms["unet"] < norm) == (limit < 1)
    assert same(part, copies(twin))


def test_each_network_is_clipped_by_itself() -> None:
    big, small = small_part({}, seed=1), small_part({}, seed=2)
    small.name = "text_encoder"
    updater = Updater([big, small], seed=0, clip_grad_norm=0.1)
    both = torch.cat([1000 * losses(big, 0), losses(small, 0)])
    updater.backward(both, torch.ones(8), 8, done=0, last=True)
    result = updater.step(0)
    for name in ("unet", "text_encoder"):
        assert result.grad_norms[name] > 0.1
        assert torch.allclose(result.clipped_norms[name], torch.tensor(0.1), rtol=1e-3)


def test_gradients_are_gone_after_a_step_and_after_discarding() -> None:
    part = small_part({"lr": 1e-2})
    updater = Updater([part], seed=0)
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=False)
    updater.discard()
    assert all(parameter.grad is None for parameter in part.parameters.values())
    run(part, updater, range(2))
    assert all(parameter.grad is None for parameter in part.parameters.values())
    twin = small_part({"lr": 1e-2})
    run(twin, Updater([twin], seed=0), range(2))
    assert same(part, copies(twin)), "what was discarded has left no trace"


OPTIMIZERS = ["adamw", "adamw8bit", "lion", "prodigy", "adamw_schedulefree", "adacoor", "scalar_dowg"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", ["loss", "loss alone", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_update_reaches_no_weight_and_no_moment(optimizer: str, where: str, clip: float | None) -> None:
    def train(bad: int | None) -> tuple[Part, Updater]:
        part = small_part({"optimizer": optimizer})
        updater = Updater([part], seed=0, clip_grad_norm=clip)
        for step in range(4):
            if step == bad:
                spoilt = losses(part, step)
                if where == "loss":
                    spoilt = spoilt * torch.tensor([1.0, float("nan"), 1.0, 1.0])
                if where == "loss alone":  # its gradients are finite
                    spoilt = spoilt + float("inf")
                updater.backward(spoilt, torch.ones(4), 4, done=step, last=True)
                if where == "gradient":
                    gradient = part.parameters["0.bias"].grad
                    assert gradient is not None
                    gradient[3] = float("inf")
                result = updater.step(step)
                assert not result.applied
                assert updater.skipped() == (1, 1)
            updater.backward(losses(part, step), torch.ones(4), 4, done=step, last=True)
            assert updater.step(step).applied
        return part, updater

    clean, _ = train(None)
    spoilt, updater = train(2)
    assert same(spoilt, copies(clean))
    assert updater.skipped() == (1, 0)


@pytest.mark.parametrize("other", ["adamw", "lion"])
def test_one_network_s_bad_gradient_stops_the_other_s(other: str) -> None:
    first, second = small_part({}, seed=1), small_part({"optimizer": other}, seed=2)
    second.name = "text_encoder"
    before = copies(first), copies(second)
    updater = Updater([first, second], seed=0)
    both = torch.cat([losses(first, 0), losses(second, 0) * float("nan")])
    updater.backward(both, torch.ones(8), 8, done=0, last=True)
    assert not updater.step(0).applied
    assert same(first, before[0])
    assert same(second, before[1])


def test_bad_updates_are_counted_in_all_and_in_a_row() -> None:
    part = small_part({})
    updater = Updater([part], seed=0)
    seen = []
    for done, bad in enumerate([True, True, False, True]):
        factor = float("nan") if bad else 1.0
        updater.backward(losses(part, done) * factor, torch.ones(4), 4, done=done, last=True)
        updater.step(done)
        seen.append(updater.skipped())
    assert seen == [(1, 1), (2, 2), (2, 0), (3, 1)]


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_to_copy.cpu")):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("adamw", 0), ("adacoor", 0), ("lion", 1), ("adamw8bit", 1), ("adamw_schedulefree", 1)]
)
@pytest.mark.parametrize("fp16", [False, True])
def test_host_reads_in_an_update(optimizer: str, expected: int, fp16: bool) -> None:
    part = small_part({"optimizer": optimizer})
    updater = Updater([part], seed=0, clip_grad_norm=1.0, loss_scale=LossScale("cpu") if fp16 else None)
    run(part, updater, range(2))
    with Syncs() as syncs:
        updater.backward(losses(part, 2), torch.ones(4), 4, done=2, last=True)
        updater.step(2)
    assert len(syncs.names) == expected, syncs.names


def test_fp16_scale_leaves_the_update_as_it_was() -> None:
    plain, scaled = small_part({"lr": 1e-2}), small_part({"lr": 1e-2})
    run(plain, Updater([plain], seed=0, clip_grad_norm=0.5), range(5))
    # A power of two scales without rounding.
    updater = Updater([scaled], seed=0, clip_grad_norm=0.5, loss_scale=LossScale("cpu", initial=2.0**17))
    for done in range(5):
        updater.backward(losses(scaled, done), torch.ones(4), 4, done=done, last=True)
        result = updater.step(done)
        assert result.grad_norms["unet"] < 10
        assert result.loss < 20
    assert same(scaled, copies(plain))


def test_sum_over_processes_decides_for_all() -> None:
    part = small_part({})
    before = copies(part)
    updater = Updater([part], seed=0, sum_over_processes=lambda loss: loss + float("nan"))
    updater.backward(losses(part, 0), torch.ones(4), 4, done=0, last=True)
    assert not updater.step(0).applied
    assert same(part, before)


def saved_state(**base: Any) -> tuple[Part, dict[str, Any]]:
    part = small_part(base)
    updater = Updater([part], seed=0)
    run(part, updater, range(3))
    return part, updater.state_dict()


def test_today_s_options_win_over_saved_ones_and_are_said() -> None:
    part, state = saved_state(lr=1e-2, betas=[0.9, 0.99], weight_decay=0.1)
    today = small_part({"lr": 2e-2, "betas": [0.5, 0.9], "lr_scheduler": "cosine", "lr_warmup_steps": 0})
    updater = Updater([today], seed=0)
    lines = updater.load_state_dict(state)
    assert lines == [
        "unet: lr was 0.01, is 0.02 from now on",
        "unet: lr_scheduler was constant, is cosine from now on",
        "unet: betas was [0.9, 0.99], is [0.5, 0.9] from now on",
        "unet: weight_decay was 0.1, is not given from now on",
    ]
    group = today.optimizers[0].param_groups[0]
    assert group["betas"] == (0.5, 0.9)
    assert group["weight_decay"] == 1e-2, "torch's own default"
    moments = today.optimizers[0].state[today.parameters["0.weight"]]["exp_avg"]
    assert torch.equal(moments, part.optimizers[0].state[part.parameters["0.weight"]]["exp_avg"])
    updater.backward(losses(today, 0), torch.ones(4), 4, done=0, last=True)
    assert updater.step(0).rates == {"unet": 2e-2}


def test_found_rates_go_on_where_they_were() -> None:
    part = small_part({"optimizer": "prodigy", "d0": 1e-4})
    updater = Updater([part], seed=0)
    for done in range(5):
        updater.backward(losses(part, 0, batch=16), torch.ones(16), 16, done=done, last=True)
        updater.step(done)
    state = updater.state_dict()
    found = part.optimizers[0].param_groups[0]["d"]
    today = small_part({"optimizer": "prodigy", "d0": 1e-4, "weight_decay": 0.2})
    Updater([today], seed=0).load_state_dict(state)
    group = today.optimizers[0].param_groups[0]
    assert (group["d"], group["k"]) == (found, 5)
    assert found > 1e-4
    assert group["weight_decay"] == 0.2


def test_state_that_does_not_fit_is_refused_in_words() -> None:
    _, state = saved_state()
    with pytest.raises(UserError, match="adamw's, this run uses lion"):
        Updater([small_part({"optimizer": "lion"})], seed=0).load_state_dict(state)
    other = small_part({})
    other.parameters.pop("0.bias")
    with pytest.raises(UserError, match="4 weights of the unet, this run 3"):
        Updater([other], seed=0).load_state_dict(state)
    second = small_part({})
    second.name = "text_encoder"
    with pytest.raises(UserError, match="trains unet, this run text_encoder"):
        Updater([second], seed=0).load_state_dict(state)
