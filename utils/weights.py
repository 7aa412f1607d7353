"""Weight files from strangers: tensors come out as views of the file, or a UserError does; no code runs."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 << 20  # a full SD 1.5 needs 0.15 MiB
MAX_TENSORS = 20_000
WEIGHT_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
VARIANTS: list[str | None] = [None, "fp16", "bf16"]


def require_file(path: Path, max_bytes: int | None = None) -> int:
    """The size of the regular file `path` in bytes.

    Raises `UserError` when it is not there, is no regular file (a pipe would hang the reader) or is over `max_bytes`.
    """
    name = printable(path)
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is not a regular file")
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


def require_finite(name: str, tensor: Tensor, source: str) -> None:
    """`UserError` when `tensor` holds NaN or infinity."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # NaN is both least and greatest to aminmax, which is twenty times faster than isfinite.
    if bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    raise UserError(
        f"{printable(source)}: {bad} of {tensor.numel()} numbers in {printable(name)} are NaN or infinite; "
        f"the model is damaged, take an earlier one"
    )


def folder_weights(folder: Path, part: str, variant: str | None) -> dict[str, Tensor]:
    """The tensors of one part of a Diffusers folder, whole or in shards, safetensors before pickles.

    Args:
        folder: the part's folder, such as `model/unet`.
        part: "unet", "text_encoder" or "vae".
        variant: such as "fp16"; `None` takes plain names, and a half-precision variant only when there is nothing else.
    """
    stems = WEIGHT_STEMS[part]
    names = weight_names({path.name for path in folder.iterdir()}, stems, variant)
    if names is None:
        wanted = f" of the variant {printable(variant)}" if variant is not None else ""
        raise UserError(
            f"{printable(folder)} holds no complete weights{wanted} ({stems[0]}.safetensors or {stems[-1]}.bin)"
        )
    if names[0].endswith(".json"):
        names = _shards(folder / names[0])
    return _read_all([folder / name for name in names])


def weight_names(names: Collection[str], stems: tuple[str, ...], variant: str | None) -> list[str] | None:
    """Which of the files `names` of a part hold its weights: one file, or an index and its shards; `None` for none."""
    variants = [variant] if variant is not None else VARIANTS
    for ending in ("safetensors", "bin"):
        for chosen in variants:
            middle = "" if chosen is None else f".{chosen}"
            for stem in stems:
                if f"{stem}{middle}.{ending}" in names:
                    return [f"{stem}{middle}.{ending}"]
                # Diffusers and Transformers spell the variant of an index and of its shards differently.
                for index in (f"{stem}.{ending}.index{middle}.json", f"{stem}{middle}.{ending}.index.json"):
                    pattern = (
                        rf"{re.escape(stem)}(?:{re.escape(middle)})?-\d+-of-(\d+)(?:{re.escape(middle)})?\.{ending}"
                    )
                    shards = {name: int(found[1]) for name in names if (found := re.fullmatch(pattern, name))}
                    if index in names and shards and len(shards) == max(shards.values()):
                        return [index, *sorted(shards)]
    return None


def _shards(index: Path) -> list[str]:
    require_file(index, MAX_HEADER_BYTES)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{printable(index)} is no index of weight files; get it again") from None
    for name in names:
        if not isinstance(name, str) or name in (".", "..") or re.fullmatch(r"[\w.-]+", name) is None:
            raise UserError(f"{printable(index)} names {printable(name)!r}, which is not a file beside it")
    return names


def _read_all(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_weights(path).items():
            if name in tensors:
                raise UserError(f"{printable(path)} holds {printable(name)}, which another shard holds as well")
            tensors[name] = tensor
    return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a torch pickle (`.bin`, `.ckpt`, `.pt`), by name."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    from utils.pickles import read_pickle

    return read_pickle(path)
