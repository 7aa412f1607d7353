"""Where a run computes: the device, its precision and its memory; the one file that names torch.cuda and accelerate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from utils.config import DeviceOptions
from utils.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the precision in which networks compute on it.

    Args:
        amp_dtype: the dtype of autocast, `None` for fp32 throughout.
    """

    torch_device: torch.device
    name: str
    amp_dtype: torch.dtype | None

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU: pinned transfers, memory figures, 8-bit optimizers by default."""
        return self.torch_device.type == "cuda"

    @property
    def needs_loss_scale(self) -> bool:
        """fp16 gradients underflow without a loss scale; bf16 has the range of fp32."""
        return self.amp_dtype == torch.float16

    @property
    def precision(self) -> str:
        """The precision in a word, for logs."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.amp_dtype or torch.float32, "fp32")

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Networks compute in `amp_dtype` here; weights, losses and gradients stay fp32."""
        if self.amp_dtype is None:
            yield
            return
        with torch.autocast(self.torch_device.type, dtype=self.amp_dtype):
            yield

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that the device is full; if so its unused cache is given back."""
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        if self.is_cuda:
            torch.cuda.empty_cache()
        return True

    def begin_peak(self) -> None:
        """Count the peak of `peak_gib` from here on."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_gib(self) -> float | None:
        """The most memory in use at once since `begin_peak`, in GiB; `None` on the CPU, where nobody counts."""
        return torch.cuda.max_memory_allocated(self.torch_device) / 2**30 if self.is_cuda else None

    def memory_gib(self) -> tuple[float, float] | None:
        """GiB in use at the peak and GiB in all, `None` on the CPU. Reads counters, does not wait for the device."""
        if not self.is_cuda:
            return None
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        return torch.cuda.max_memory_reserved(self.torch_device) / 2**30, total / 2**30


def open_device(options: DeviceOptions, *, bf16_weights: bool = False) -> Device:
    """The device of the run, and process-wide settings for it; `bf16_weights` compute in bf16 everywhere.

    Raises:
        UserError: the GPU that was asked for is not there, or cannot compute in the precision that was asked for.
    """
    from accelerate import PartialState

    if bf16_weights and (options.disable_amp or options.amp_dtype == "fp16"):
        raise UserError("weight_dtype = bf16 computes in bf16; leave disable_amp out and amp_dtype at auto")
    use_cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    if use_cuda:
        _check_gpu(options.gpuid)
        if "LOCAL_RANK" not in os.environ:
            torch.cuda.set_device(options.gpuid)
    _set_determinism(options.deterministic)
    state = PartialState(cpu=not use_cuda)
    if state.num_processes > 1:
        raise UserError("training on several devices is not built yet; start train.py without accelerate launch")
    device = torch.device("cuda", options.gpuid) if use_cuda else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if use_cuda else f"CPU, {torch.get_num_threads()} threads"
    return Device(device, name, torch.bfloat16 if bf16_weights else _amp_dtype(options, use_cuda))


def _check_gpu(gpuid: int) -> None:
    if not torch.cuda.is_available():
        raise UserError(
            "device = cuda, but torch sees no GPU; install the CUDA build of torch and a driver, or use --device cpu"
        )
    count = torch.cuda.device_count()
    if gpuid >= count:
        raise UserError(f"gpuid = {gpuid}, but there are {count} GPUs, counted from 0; choose one of those")


def _amp_dtype(options: DeviceOptions, use_cuda: bool) -> torch.dtype | None:
    if options.disable_amp:
        return None
    if options.amp_dtype != "auto":
        if options.amp_dtype == "bf16" and use_cuda and not torch.cuda.is_bf16_supported():
            raise UserError("amp_dtype = bf16, but this GPU has none; use fp16 or auto")
        return _DTYPES[options.amp_dtype]
    if not use_cuda:
        return None  # half precision is slower than fp32 on most CPUs
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _set_determinism(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
        torch.use_deterministic_algorithms(True)
    else:
        # The few bucket sizes come up again and again, so searching for the fastest convolution pays.
        torch.backends.cudnn.benchmark = True
