"""Training on a GPU: every precision, exact resume, memory, and a loop that never waits for the device.

`pytest -m gpu tests/gpu` runs them where there is CUDA. With GPU_TESTS_DEVICE=cpu the same bodies run on the CPU, as a
test of the tests; one of them always does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.option_lab import Lab, Outcome, same

# cuBLAS reads it at its first call, which may come before the run that asks for exactness.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INSTEAD = os.environ.get("GPU_TESTS_DEVICE", "cuda")
missing = INSTEAD == "cuda" and not torch.cuda.is_available()
GPU = pytest.param(INSTEAD, marks=[pytest.mark.gpu, pytest.mark.skipif(missing, reason="no CUDA here")], id="gpu")
on_gpu = pytest.mark.parametrize("kind", [GPU])
on_both = pytest.mark.parametrize("kind", ["cpu", GPU])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    """A deterministic run sets this for its process; the next test must not inherit it."""
    yield
    torch.use_deterministic_algorithms(False)


def peak_bytes(kind: str) -> int:
    """The most memory in use since `reset_peak`; 0 on the CPU, where nobody counts."""
    return int(torch.cuda.max_memory_allocated()) if kind == "cuda" else 0


def reset_peak(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class _NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """On the CPU, what would wait on a GPU: reading a tensor into Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(kind: str) -> Iterator[None]:
    """Inside, an operation for which the host waits for the device raises."""
    if kind != "cuda":
        with _NoHostReads():  # type: ignore[no-untyped-call]
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- precision

TWENTY: dict[str, Any] = {"max_steps": 20, "batch_size": 4, "lr": 3e-4}


def losses(lab: Lab, **changes: Any) -> list[float]:
    outcome = lab.run(**TWENTY, **changes)
    assert outcome.code == 0, outcome.told
    assert all(bool(torch.isfinite(tensor).all()) for tensor in outcome.weights("unet").values())
    return outcome.scalars("loss/log_step")


@on_gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ({"amp_dtype": "bf16"}, 0.03),
        ({"amp_dtype": "fp16"}, 0.03),
        ({"disable_amp": True}, 0.003),
    ],
    ids=["bf16", "fp16", "fp32"],
)
def test_twenty_updates_go_as_on_the_cpu_in_fp32(
    kind: str, precision: dict[str, Any], tolerance: float, lab: Lab
) -> None:
    """The draws are the same everywhere, so the losses are, up to rounding."""
    found = losses(lab, device=kind, **precision)
    assert len(found) == 20
    assert found == pytest.approx(losses(lab), rel=tolerance)
    outcome = lab.run(**TWENTY, device=kind, **precision)
    if "fp16" in precision.values():
        scales = outcome.scalars("hyperparameter/grad scale")
        assert scales[0] <= 2**17.5
        assert min(scales) > 2**10, "it has found its place"
    if kind == "cuda":
        assert 0 < outcome.scalars("performance/vram")[-1] < 8


@on_gpu
def test_eight_bit_moments_learn_like_whole_ones(kind: str, lab: Lab) -> None:
    pytest.importorskip("bitsandbytes")
    file = lab.write("adamw8bit.json", {"base": {"optimizer": "adamw8bit", "lr": 3e-4}})
    outcome = lab.run(**TWENTY, device=kind, optimizer_config=file)
    assert losses(lab, device=kind, optimizer_config=file) == pytest.approx(losses(lab), rel=0.03)
    dtypes = {tensor.dtype for tensor in tensors_of(outcome.state["updater"]["parts"]["unet"])}
    assert torch.uint8 in dtypes, "large weights have 8-bit moments"


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(part)


# --- memory


def train_some(lab: Lab, kind: str, updates: int, **changes: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The UNet's weights after so many updates, and the most memory that was in use."""
    from training.loop import train_update

    with lab.session(device=kind, **changes) as session:
        plan = session.data.plan(0)
        batches = session.batches.epoch(plan)
        train_update(session, plan[0], batches)  # gradients and moments have come to stay
        reset_peak(kind)
        for update in plan[1 : updates + 1]:
            train_update(session, update, batches)
        peak = peak_bytes(kind)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in session.models.unet.state_dict().items()}
    return weights, peak


@on_gpu
def test_checkpointing_saves_memory_and_changes_nothing(kind: str, lab: Lab) -> None:
    changes = {"disable_amp": True, "resolution": 256, "batch_size": 2, "lr": 1e-4}
    plain, most = train_some(lab, kind, 2, **changes)
    checkpointed, less = train_some(lab, kind, 2, gradient_checkpointing=True, **changes)
    for name, tensor in plain.items():
        assert torch.allclose(tensor, checkpointed[name], atol=2e-4), name
    assert less < 0.8 * most or kind == "cpu"


@on_gpu
def test_what_fits_in_the_largest_bucket_fits_in_all(kind: str, lab: Lab) -> None:
    from training.loop import train_update

    with lab.session(device=kind, resolution=512, bucket_step=64, batch_size=2, disable_amp=True) as session:
        plan = list(session.data.plan(0))

        def area(update: Any) -> int:
            return max(int(part.bucket[0] * part.bucket[1]) for part in update.micro_batches)

        plan.sort(key=area, reverse=True)
        batches = session.batches.epoch(plan)
        train_update(session, plan[0], batches)
        peaks = []
        for update in plan[1:]:
            reset_peak(kind)
            train_update(session, update, batches)
            peaks.append(peak_bytes(kind))
        assert area(plan[0]) == 512 * 512
        assert all(peak <= 1.1 * peaks[0] for peak in peaks), peaks


# --- exactness


@on_gpu
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(kind: str, lab: Lab) -> None:
    changes = {
        "device": kind,
        "deterministic": True,
        "max_steps": 6,
        "grad_accum": 2,
        "ema_decay_rate": 0.9,
        "ema_update_interval": 1,
        "ema_device": kind,
    }
    straight = lab.run(**changes)
    saving = lab.run(**changes, ckpt_every_n_minutes=0, save_optimizer=True)
    wanted = {part: straight.weights(part) for part in ("unet", "text_encoder")}
    assert all(same(saving.weights(part), weights) for part, weights in wanted.items()), "saving changes nothing"
    (half,) = saving.folder.glob("ckpts/lab-*gs00003")
    shutil.rmtree(saving.last)
    told = lab.run(**changes, resume_ckpt=str(half), resume_mode="exact", save_optimizer=True).told
    assert "update 3/6" not in told
    assert "update 4/6" in told
    resumed = Outcome(0, told, saving.logdir)
    assert all(same(resumed.weights(part), weights) for part, weights in wanted.items())
    assert same(resumed.state["ema"]["unet"], straight.state["ema"]["unet"])


@on_gpu
def test_the_average_is_the_same_on_either_device(kind: str, lab: Lab) -> None:
    changes = {"device": kind, "deterministic": True, "max_steps": 4, "disable_amp": True}
    averages = [
        lab.run(**changes, ema_decay_rate=0.5, ema_update_interval=2, ema_device=where) for where in (kind, "cpu")
    ]
    here, there = (outcome.state["ema"]["unet"] for outcome in averages)
    assert all(torch.allclose(here[name], there[name], atol=1e-6) for name in there)
    plain = lab.run(**changes)
    assert same(averages[0].weights("unet"), plain.weights("unet")), "training with EMA is training without"
    with lab.session(**changes, ema_decay_rate=0.5, ema_update_interval=1, ema_device=kind) as session:
        assert session.ema is not None
        assert {tensor.device.type for tensor in session.ema.tensors("unet").values()} == {kind}


# --- pace


@on_both
@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_update_waits_for_the_device(kind: str, clip: float | None, lab: Lab) -> None:
    """Between logs the host runs ahead: nothing of an update is read, also with clipping, scaler and EMA."""
    from training.between import after_update
    from training.loop import train_update

    changes = {
        "device": kind,
        "amp_dtype": "fp16",
        "clip_grad_norm": clip,
        "log_step": 1000,
        "max_steps": 1000,
        "ema_decay_rate": 0.9,
        "ema_update_interval": 1,
        "ema_device": kind,
    }
    with lab.session(**changes) as session:
        plan = session.data.plan(0)
        batches = list(session.batches.epoch(plan))
        # The first update builds moments and lets libraries choose their kernels.
        train_update(session, plan[0], iter(batches))
        first = len(plan[0].micro_batches)
        rest = iter(batches[first:])
        with no_waiting(kind):
            for update in plan[1:]:
                train_update(session, update, rest)
                after_update(session)
        assert session.progress.update == len(plan)
        assert session.updater.skipped()[1] <= 3


def test_the_watch_for_reads_sees_one() -> None:
    with pytest.raises(AssertionError, match="reads"), no_waiting("cpu"):
        torch.ones(()).item()
