"""A model for other programs: Diffusers folder and single file, written from tensors and JSON, then read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.errors import UserError, printable
from utils.hub import looks_like_id
from utils.keymap import disk_name, key_map
from utils.model_files import CLASSES, COMPONENTS, TOKENIZER_FILES, ModelFiles, read_model_files
from utils.tensor_writer import (
    CHUNK_NUMBERS,
    NO_HASH,
    UNSEALED_KEY,
    Piece,
    hash_tensors,
    same_tensor,
    seal,
    write_tensors,
)
from utils.weights import count_not_finite, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, Mapping[str, "Tensor"]]

FILE_NAMES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SETTINGS = "tokenizer_config.json"
# Empty tensors that web UIs look for: nothing else in the file tells these models from others.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"


def disk_weights(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """`weights` under the names they have on disk, without buffers that belong to no file."""
    return {
        part: {disk_name(part, name): tensor for name, tensor in weights[part].items() if not _is_buffer(name)}
        for part in COMPONENTS
    }


def _is_buffer(name: str) -> bool:
    return name.endswith("position_ids")


def write_folder(folder: Path, weights: Weights, files: ModelFiles, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a Diffusers folder that any Diffusers program loads, from memory, casting tensor by tensor.

    Args:
        folder: made when it is not there; nothing is written outside it, and syncing is left to the caller.
        weights: the tensors of "unet", "text_encoder" and "vae" by name, on the CPU.
        files: configurations and tokenizer, the scheduler already marked (see `models.describe`).
        dtype: of all three parts.
    """
    for part, tensors in disk_weights(weights).items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        _write_json(folder / part / "config.json", _config(files, part))
        pieces = [Piece(name, tuple(tensor.shape), partial(_as_is, tensor)) for name, tensor in tensors.items()]
        write_tensors(folder / part / FILE_NAMES[part], pieces, dtype, {"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", files.scheduler)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name, content in _tokenizer_for_all(files.tokenizer).items():
        assert name in TOKENIZER_FILES, name
        (folder / "tokenizer" / name).write_bytes(content)
        (folder / "tokenizer" / name).chmod(0o644)
    _write_json(folder / "model_index.json", _model_index(files))


def check_folder(folder: Path, weights: Weights, dtype: torch.dtype = torch.float16) -> None:
    """Read `folder` back and compare every tensor with `weights`; `UserError` that names the first difference."""
    read_model_files(folder)
    for part, tensors in disk_weights(weights).items():
        path = folder / part / FILE_NAMES[part]
        _compare(path, read_safetensors(path), dict(tensors), dtype)


def write_single_file(
    path: Path,
    weights: Weights,
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the single file in the original layout and return the paths written.

    For SD 2.x and for v-prediction a `.yaml` of the same name stands beside it, as web UIs expect. `metadata` comes
    from `modelspec`; the hash of the tensors is added to it by `check_single_file`.
    """
    pieces = single_file_pieces(disk_weights(weights), files)
    spoken = {"format": "pt", **(metadata if metadata is not None else {})}
    write_tensors(path, pieces, dtype, spoken | {UNSEALED_KEY: NO_HASH})
    yaml = yaml_beside(path, files)
    if yaml is None:
        return [path]
    from utils.ldm_yaml import ldm_yaml

    yaml.write_text(ldm_yaml(files), encoding="utf-8", newline="\n")
    yaml.chmod(0o644)
    return [path, yaml]


def yaml_beside(path: Path, files: ModelFiles) -> Path | None:
    """The `.yaml` that `write_single_file` writes beside `path`, or `None`."""
    return None if files.kind == "sd1" and files.prediction_type == "epsilon" else path.with_suffix(".yaml")


def check_single_file(path: Path, weights: Weights, files: ModelFiles, dtype: torch.dtype = torch.float16) -> None:
    """Read the single file back, compare every tensor with `weights`, then put the hash of them all into its metadata.

    `UserError` names the first difference.
    """
    pieces = single_file_pieces(disk_weights(weights), files)
    with ThreadPoolExecutor(1) as helper:
        hashing = helper.submit(hash_tensors, path)
        _compare(path, read_safetensors(path), {piece.name: piece.make for piece in pieces}, dtype)
    seal(path, hashing.result())


def single_file_pieces(weights: Weights, files: ModelFiles) -> list[Piece]:
    """What the single file holds, made of `weights` under their names on disk, markers for web UIs included."""
    pieces = []
    for entry in key_map(files, weights):
        sources = [weights[entry.part][name] for name in entry.sources]
        shape = (len(sources) * sources[0].shape[0], *sources[0].shape[1:]) if len(sources) > 1 else sources[0].shape
        if entry.as_conv and len(shape) == 2:
            shape = (*shape, 1, 1)
        pieces.append(Piece(entry.name, tuple(shape), partial(_assemble, sources, tuple(shape))))
    markers = [V_MARKER] if files.prediction_type == "v_prediction" else []
    markers += [ZERO_SNR_MARKER] if files.zero_terminal_snr else []
    return pieces + [Piece(name, (0,), partial(torch.empty, 0)) for name in markers]


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _assemble(sources: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return (torch.cat(sources) if len(sources) > 1 else sources[0]).reshape(shape)


def _compare(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Any], dtype: torch.dtype) -> None:
    name = printable(path)
    if found.keys() != expected.keys():
        strays = sorted(set(found) ^ set(expected))
        raise UserError(f"{name} does not hold the tensors that were written: {', '.join(map(printable, strays[:3]))}")
    buffer = torch.empty(CHUNK_NUMBERS, dtype=dtype)
    for key, source in expected.items():
        if not same_tensor(found[key], source() if callable(source) else source, buffer):
            raise UserError(f"{name}: {printable(key)} differs from the model in memory; the disk may be failing")
        bad = count_not_finite(found[key])
        if bad:
            # It is as in memory, so it was no number there, or has become none by the cast.
            word = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {bad} of {found[key].numel()} numbers in {printable(key)} are too large for {word}, "
                f"or NaN in the model itself; write it in full precision"
            )


def _config(files: ModelFiles, part: str) -> dict[str, Any]:
    # Where the libraries found the model is a path on somebody's machine as often as not, and nobody reads it.
    config = {key: value for key, value in files.config(part).items() if key != "_name_or_path"}
    if part in CLASSES:
        return {"_class_name": CLASSES[part], **config}
    config |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    # Transformers 5 loads in the precision named here, Diffusers in fp32 unless told: the two must agree.
    config.pop("dtype", None)
    return config | {"torch_dtype": "float32"}


def _model_index(files: ModelFiles) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": str(files.unet.get("_diffusers_version", "0.6.0")),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", str(files.scheduler.get("_class_name", "PNDMScheduler"))],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", CLASSES["unet"]],
        "vae": ["diffusers", CLASSES["vae"]],
    }


def _tokenizer_for_all(tokenizer: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files, with vocab.json and merges.txt, which programs before Transformers 5 cannot do without."""
    found = dict(tokenizer)
    if SETTINGS in found:
        found[SETTINGS] = _without_path(found[SETTINGS])
    if "vocab.json" in found and "merges.txt" in found:
        return found
    model = json.loads(found["tokenizer.json"])["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False).encode("utf-8")
    found["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8")
    return found


def _without_path(settings: bytes) -> bytes:
    """The tokenizer's settings byte for byte, but without a folder that it was once loaded from."""
    content: Any = json.loads(settings)
    if not isinstance(content, dict) or "name_or_path" not in content or looks_like_id(str(content["name_or_path"])):
        return settings
    del content["name_or_path"]
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(dict(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(0o644)
