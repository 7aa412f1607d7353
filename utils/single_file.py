"""Single files in the original layout: the kind of model they hold, what it predicts, and its parts by our names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable
from utils.keymap import (
    SD1_TEXT_HOME,
    SD2_TEXT_HOME,
    TEXT_PREFIX,
    UNET_HOME,
    VAE_ATTENTION,
    VAE_HOME,
    VAE_OLD_ATTENTION,
    key_map,
)
from utils.model_files import FAMILIES, ModelFiles, check_model_files, mark_scheduler
from utils.presets import preset
from utils.strangers import stranger_by_names
from utils.weight_files import holds_safetensors, read_weights
from utils.weights import precision_word, read_header, require_file

if TYPE_CHECKING:
    from torch import Tensor

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
EMA_HOME = "model_ema.diffusion_model"
FIRST_CONVOLUTION = f"{UNET_HOME}input_blocks.0.0.weight"
CONTEXT_KEY = "attn2.to_k.weight"
# In v-prediction models of the SD 2 family these biases have spread, in the others they have not; ComfyUI decides so.
TELLTALE, TELLTALE_STD = f"{UNET_HOME}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
STATED = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
CHANNELS = {9: "an inpainting model", 8: "an image editing model", 5: "a depth model", 7: "an upscaler"}
MAX_YAML_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A single file, opened and recognised.

    Args:
        path: where it lies.
        tensors: all of them, under the names of the file.
        files: configurations without tokenizer, the scheduler marked with what was found.
        told: one line on what was recognised, and by what.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    files: ModelFiles
    told: str


def open_single_file(
    path: Path, *, prediction_type: str | None = None, base: ModelFiles | None = None, ema: bool = False
) -> SingleFile:
    """Open and recognise the single file `path`; tensors are read on use.

    Args:
        path: `.safetensors`, or a torch pickle, from which no code is run.
        prediction_type: overrides what is found; `None` finds it.
        base: configurations to use in place of those of the family, for models of unusual size.
        ema: take the averaged UNet of files that hold both.

    Raises `UserError` when it is no Stable Diffusion 1.x or 2.x, or lacks a part.
    """
    tensors = _settle(read_weights(path), path, ema)
    _refuse_strangers(tensors, path)
    kind = _kind(tensors, path) if base is None else _kind_of_base(tensors, path, base)
    found, how = _prediction(tensors, path, kind, base)
    if prediction_type is not None:
        found, how = prediction_type, "as you said"
    files = base if base is not None else preset(kind, found)
    zero_snr = ZERO_SNR_MARKER in tensors or files.zero_terminal_snr
    files = replace(files, scheduler=mark_scheduler(files.scheduler, found, zero_snr))
    check_model_files(files, str(path))
    told = f"{printable(path.name)}: {files.summary(how, precision_word(tensors[FIRST_CONVOLUTION]))}"
    if ema:
        told += ", averaged weights (model_ema)"
    elif any(name.startswith(EMA_HOME) for name in tensors):
        told += "; its averaged weights are left alone, model_ema would take them"
    return SingleFile(path, tensors, files, told)


def split(single: SingleFile, names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Tensor]]:
    """The three parts of `single` under the disk names `names` of its networks.

    Raises `UserError` that lists tensors which are missing, or in the UNet left over.
    """
    entries = key_map(single.files, names)
    missing = sorted(entry.name for entry in entries if entry.name not in single.tensors)
    known = {entry.name for entry in entries}
    strays = sorted(name for name in single.tensors if name.startswith(UNET_HOME) and name not in known)
    for word, keys in (("lacks", missing), ("holds", strays)):
        if keys:
            shown = ", ".join(map(printable, keys[:3])) + (", ..." if len(keys) > 3 else "")
            count = f"{len(keys)} tensor" + ("s" if len(keys) > 1 else "")
            reason = "that a model of this kind has" if word == "lacks" else "that no model of this kind has"
            raise UserError(f"{printable(single.path)} {word} {count} {reason}: {shown}; take another copy or version")
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}, "vae": {}}
    for entry in entries:
        tensor = single.tensors[entry.name]
        if entry.as_conv and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[..., 0, 0]
        if len(entry.sources) > 1 and (tensor.dim() == 0 or tensor.shape[0] % len(entry.sources)):
            raise UserError(f"{printable(single.path)}: {entry.name} has shape {tuple(tensor.shape)}, not three in one")
        pieces = tensor.chunk(len(entry.sources)) if len(entry.sources) > 1 else (tensor,)
        parts[entry.part].update(zip(entry.sources, pieces, strict=True))
    return parts


def _settle(tensors: Mapping[str, Tensor], path: Path, ema: bool) -> dict[str, Tensor]:
    """The tensors with the spellings of older programs, and the EMA copy where it is wanted, under the usual names."""
    if ema:
        averaged = [name for name in tensors if name.startswith(EMA_HOME)]
        if not averaged:
            raise UserError(f"{printable(path)} holds no averaged weights ({EMA_HOME}...); leave model_ema out")
        # The averaged copy's names have lost their dots; the plain ones tell where they were.
        plain = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": name for name in tensors}
        tensors = {**tensors, **{plain[name]: tensors[name] for name in averaged if name in plain}}
    return {_spelling(name): tensor for name, tensor in tensors.items()}


def _spelling(name: str) -> str:
    if name.startswith("conditioner.embedders.0."):  # SD 1 and 2 as saved by the generative-models code
        name = "cond_stage_model." + name.removeprefix("conditioner.embedders.0.")
    if name.startswith(SD1_TEXT_HOME) and not name.startswith(SD1_TEXT_HOME + TEXT_PREFIX):
        return SD1_TEXT_HOME + TEXT_PREFIX + name.removeprefix(SD1_TEXT_HOME)
    # Scripts that are older than the Diffusers whose folders they converted have kept its words here.
    found = re.fullmatch(rf"({re.escape(VAE_HOME)}\w+\.mid\.attn_1\.)(.+)\.(weight|bias)", name)
    if found is not None:
        module = VAE_OLD_ATTENTION.get(found[2], found[2])
        return f"{found[1]}{VAE_ATTENTION.get(module, module)}.{found[3]}"
    return name


def _refuse_strangers(tensors: Mapping[str, Tensor], path: Path) -> None:
    name = printable(path)
    first = tensors.get(FIRST_CONVOLUTION)
    stranger = stranger_by_names(tensors, has_unet=first is not None)
    if stranger is not None:
        raise UserError(f"{name} is {stranger}")
    if first is None or first.dim() != 4:
        raise UserError(
            f"{name} is no Stable Diffusion 1.x or 2.x in the original layout: it has no {FIRST_CONVOLUTION}"
        )
    if first.shape[1] != 4:
        what = CHANNELS.get(first.shape[1], "no text-to-image model")
        raise UserError(f"{name} is {what} ({first.shape[1]} input channels), which cannot be trained here")
    parts = {"VAE": (VAE_HOME,), "text encoder": (SD1_TEXT_HOME, SD2_TEXT_HOME)}
    for part, homes in parts.items():
        if not any(key.startswith(homes) for key in tensors):
            raise UserError(f"{name} holds no {part}; take the whole model")


def _kind(tensors: Mapping[str, Tensor], path: Path) -> str:
    widths = {tensor.shape[-1] for key, tensor in tensors.items() if key.endswith(CONTEXT_KEY) and tensor.dim() == 2}
    kinds = {(768,): "sd1", (1024,): "sd2"}
    kind = kinds.get(tuple(widths))  # type: ignore[arg-type]
    if kind is None:
        raise UserError(
            f"{printable(path)} has an unusual text width ({', '.join(map(str, sorted(widths)))}); name a Diffusers "
            f"folder of the same shape as model_config"
        )
    return kind


def _kind_of_base(tensors: Mapping[str, Tensor], path: Path, base: ModelFiles) -> str:
    homes = {"sd1": SD1_TEXT_HOME, "sd2": SD2_TEXT_HOME}
    home = homes.pop(base.kind)
    if not any(name.startswith(home) for name in tensors):
        (other,) = homes
        raise UserError(
            f"{printable(path)} is {FAMILIES[other]}, but model_config describes {FAMILIES[base.kind]}; "
            f"name a model of the same kind, or leave model_config out"
        )
    return base.kind


def _prediction(tensors: Mapping[str, Tensor], path: Path, kind: str, base: ModelFiles | None) -> tuple[str, str]:
    """What the UNet predicts, and what says so: the file before its neighbours before a guess."""
    if holds_safetensors(path):
        metadata = read_header(path).get("__metadata__")
        stated = metadata.get("modelspec.prediction_type") if isinstance(metadata, dict) else None
        if isinstance(stated, str) and stated in STATED:
            return STATED[stated], "by the file's metadata"
    if V_MARKER in tensors:
        return "v_prediction", f"by the marker {V_MARKER}"
    from_yaml = _parameterization(path.with_suffix(".yaml"))
    if from_yaml is not None:
        return from_yaml, f"by {printable(path.with_suffix('.yaml').name)}"
    if base is not None:
        return base.prediction_type, "by model_config"
    telltale = tensors.get(TELLTALE)
    if kind == "sd2" and telltale is not None:
        spread = float(telltale.float().std(unbiased=False))
        return ("v_prediction" if spread > TELLTALE_STD else "epsilon"), "by its weights; prediction_type overrides"
    return "epsilon", "as all of its kind"


def _parameterization(path: Path) -> str | None:
    if not path.is_file():
        return None
    import yaml

    require_file(path, MAX_YAML_BYTES)
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        stated = content["model"]["params"].get("parameterization", "eps")
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return STATED.get(stated) if isinstance(stated, str) else None
