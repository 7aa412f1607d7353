"""Where a model comes from: a Diffusers folder, a single file or a repository becomes configurations and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, printable
from utils.model_files import COMPONENTS, ModelFiles, mark_scheduler, read_model_files, read_tokenizer_files
from utils.weight_files import folder_weights, has_variant
from utils.weights import precision_word, require_file

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")
Names = Mapping[str, list[str]]
Parts = Mapping[str, Mapping[str, "Tensor"]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user said about the model to be read.

    Args:
        variant: of a Diffusers folder or repository, such as "fp16".
        revision: of a repository.
        prediction_type: "epsilon" or "v_prediction", overriding what the model says or its weights tell.
        model_config: a Diffusers folder or repository whose configurations and tokenizer describe a single file.
        ema: take the averaged UNet of a single file that holds both.
    """

    variant: str | None = None
    revision: str | None = None
    prediction_type: str | None = None
    model_config: str | None = None
    ema: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk.

    Args:
        name: as the user gave it.
        files: its configurations and tokenizer.
        parts: given the names on disk of the tensors of its networks, the tensors by part, as views of the files.
        told: one line on what it is, and what says so.
    """

    name: str
    files: ModelFiles
    parts: Callable[[Names], Parts]
    told: str


def read_source(source: str | Path, wanted: Wanted | None = None, *, tokenizer: bool = True) -> Source:
    """The model `source`: a Diffusers folder, a single file, or a Hugging Face repository id.

    Nothing is written but the Hub's own cache. Without `tokenizer`, the tokenizer of a single file is not looked for.
    Raises `UserError` that says what is wrong with it and what to do.
    """
    wanted = wanted if wanted is not None else Wanted()
    path = Path(source)
    if path.is_file() or (path.suffix in SINGLE_ENDINGS and not path.is_dir()):
        require_file(path)
        return _read_single(path, wanted, tokenizer)
    return _read_folder(local_folder(str(source), wanted), str(source), wanted)


def local_folder(source: str, wanted: Wanted, *, weights: bool = True) -> Path:
    """The folder `source`, or that of the repository of this name; `UserError` when there is neither.

    Without `weights`, those of a repository are not downloaded.
    """
    from utils.hub import looks_like_id, model_snapshot

    folder = Path(source)
    if source and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{printable(source)} is a file; a Diffusers folder or a Hugging Face id is wanted here")
    if not looks_like_id(source):
        raise UserError(
            f"there is no model {printable(source)}: name a Diffusers folder, a .safetensors or .ckpt file, or a "
            f"Hugging Face id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return model_snapshot(source, revision=wanted.revision, variant=wanted.variant, weights=weights)


def _read_folder(folder: Path, source: str, wanted: Wanted) -> Source:
    files = read_model_files(folder, source)
    how = "by its scheduler"
    if wanted.prediction_type is not None:
        marked = mark_scheduler(files.scheduler, wanted.prediction_type, files.zero_terminal_snr)
        files, how = replace(files, scheduler=marked), "as you said"
    weights = {part: folder_weights(folder / part, part, wanted.variant) for part in COMPONENTS}
    if wanted.variant is not None and not any(has_variant(folder / part, part, wanted.variant) for part in COMPONENTS):
        raise UserError(f"{printable(source)} holds no weights of the variant {printable(wanted.variant)}")
    precision = next(map(precision_word, weights["unet"].values()), "empty")
    told = f"{printable(source)}: {files.summary(how, precision)}"
    unused = ["model_ema"] * wanted.ema + ["model_config"] * (wanted.model_config is not None)
    if unused:
        told += f"; {' and '.join(unused)} are for single files and change nothing here"
    return Source(source, files, lambda _: weights, told)


def _read_single(path: Path, wanted: Wanted, tokenizer: bool) -> Source:
    from utils.single_file import open_single_file, split

    base = None
    if wanted.model_config is not None:
        try:
            base = read_model_files(local_folder(wanted.model_config, Wanted(), weights=False), wanted.model_config)
        except UserError as error:
            raise type(error)(f"model_config: {error}") from None
    single = open_single_file(path, prediction_type=wanted.prediction_type, base=base, ema=wanted.ema)
    files = single.files
    if tokenizer and base is None:
        files = replace(files, tokenizer=find_tokenizer(path, files.kind))
    return Source(str(path), files, partial(split, single), single.told)


def find_tokenizer(path: Path, kind: str) -> dict[str, bytes]:
    """The tokenizer for a single file: from a folder `tokenizer` beside it, else OpenAI's, which both kinds share."""
    from utils.hub import hub_file
    from utils.presets import TOKENIZER_REPOSITORY, tokenizer_settings

    beside = path.parent / "tokenizer"
    if beside.is_dir():
        return read_tokenizer_files(beside)
    try:
        found = {name: hub_file(TOKENIZER_REPOSITORY, name).read_bytes() for name in ("vocab.json", "merges.txt")}
    except UserError as error:
        raise type(error)(
            f"{printable(path.name)} brings no tokenizer, as no single file does, and that of {TOKENIZER_REPOSITORY} "
            f"is not to be had: {error}. Or put a folder `tokenizer` with vocab.json and merges.txt beside the file, "
            f"or name a Diffusers folder of the same kind as model_config"
        ) from None
    return found | tokenizer_settings(kind)
