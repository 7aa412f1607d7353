"""Weight files from strangers: tensors come out as views of the file, or a UserError does; no code runs."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 << 20  # a full SD 1.5 needs 0.15 MiB
MAX_TENSORS = 20_000


def require_file(path: Path, max_bytes: int | None = None) -> int:
    """The size of the regular file `path` in bytes.

    Raises `UserError` when it is not there, may not be read, is no regular file (a pipe would hang the reader) or is
    over `max_bytes`.
    """
    name = printable(path)
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is not a regular file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} cannot be read: it belongs to another user; change its permissions")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(f"{name} has {status.st_size} bytes; more than {max_bytes} are not sensible for such a file")
    return status.st_size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `path` by name, as views of the mapped file (reading happens on use).

    Raises `UserError` when the file is damaged, cut short or has a header beyond all measure.
    """
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{printable(path)} is damaged ({printable(error)}); get the file again") from None


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of the safetensors file `path`; `UserError` when there is none worth reading."""
    size = require_file(path)
    name = printable(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise UserError(f"{name} is no safetensors file, or is cut short; get it again")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{name} announces a header of {length} bytes; more than {MAX_HEADER_BYTES} are refused")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{name}: the header is no JSON; the file is damaged or is no safetensors file") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise UserError(f"{name}: the header lists no tensors, or more than {MAX_TENSORS}")
    return header


def precision_word(tensor: Tensor) -> str:
    """The precision of `tensor` as users call it: fp32, fp16, bf16."""
    word = str(tensor.dtype).removeprefix("torch.")
    return {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(word, word)


def first_line(error: Exception) -> str:
    """What a library had to say, in one line that any log can take."""
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__)


def require_finite(name: str, tensor: Tensor, source: str) -> None:
    """`UserError` when `tensor` holds NaN or infinity."""
    bad = count_not_finite(tensor)
    if bad:
        raise UserError(
            f"{printable(source)}: {bad} of {tensor.numel()} numbers in {printable(name)} are NaN or infinite; "
            f"the model is damaged, take an earlier one"
        )


def count_not_finite(tensor: Tensor) -> int:
    """How many numbers in `tensor` are NaN or infinite."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    # NaN is both least and greatest to aminmax, which is twenty times faster than isfinite.
    if bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())
