"""Which files of a Diffusers folder hold the weights of a part, and the tensors in them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, printable
from utils.pickles import read_pickle
from utils.strangers import stranger_by_beginning
from utils.weights import MAX_HEADER_BYTES, read_safetensors, require_file

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
VARIANTS: list[str | None] = [None, "fp16", "bf16"]
_HEAD_BYTES, _ZIP = 64, b"PK\x03\x04"


def folder_weights(folder: Path, part: str, variant: str | None) -> dict[str, Tensor]:
    """The tensors of one part of a Diffusers folder, whole or in shards, safetensors before pickles.

    Args:
        folder: the part's folder, such as `model/unet`.
        part: "unet", "text_encoder" or "vae".
        variant: such as "fp16"; a part that has no such variant is taken as it is. `None` takes plain names, and a
            half-precision variant only when there is nothing else.
    """
    names = part_names({path.name for path in folder.iterdir()}, part, variant)
    if names is None:
        stems = WEIGHT_STEMS[part]
        raise UserError(f"{printable(folder)} holds no complete weights ({stems[0]}.safetensors or {stems[-1]}.bin)")
    if names[0].endswith(".json"):
        names = _shards(folder / names[0])
    return _read_all([folder / name for name in names])


def has_variant(folder: Path, part: str, variant: str) -> bool:
    """Whether the part's folder `folder` has weights of this variant."""
    return weight_names({path.name for path in folder.iterdir()}, WEIGHT_STEMS[part], variant) is not None


def part_names(names: Collection[str], part: str, variant: str | None) -> list[str] | None:
    """Which of the files `names` of a part hold its weights, in `variant` where there is one; `None` for none."""
    stems = WEIGHT_STEMS[part]
    found = weight_names(names, stems, variant)
    return found if found is not None or variant is None else weight_names(names, stems, None)


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
    """The tensors of a safetensors file or of a torch pickle (`.bin`, `.ckpt`, `.pt`), by name.

    What it holds decides, not what it is called: files are renamed. Raises `UserError` for anything else.
    """
    require_file(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _begins_as_safetensors(head):
        return read_safetensors(path)
    stranger = stranger_by_beginning(head)
    if stranger is not None:
        raise UserError(f"{printable(path)} {stranger}")
    if path.suffix.lower() == ".safetensors" and not head.startswith(_ZIP):
        return read_safetensors(path)  # which says what is wrong with it
    return read_pickle(path)


def holds_safetensors(path: Path) -> bool:
    """Whether the file `path` begins as a safetensors file does."""
    with path.open("rb") as file:
        return _begins_as_safetensors(file.read(_HEAD_BYTES))


def _begins_as_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then a JSON object."""
    return head[8:9] == b"{"
