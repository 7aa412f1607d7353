"""What a checkpoint of a run holds: training state, Diffusers folder, single file, and for the average its own."""

from __future__ import annotations

import datetime
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.checkpoint import Kind, Progress, Record
from utils.config import SaveOptions
from utils.export import check_folder, check_single_file, write_folder, write_single_file
from utils.files import atomic_file, rename
from utils.logs import LOGGER
from utils.modelspec import modelspec
from utils.writer import Save

if TYPE_CHECKING:
    from torch import Tensor

    from utils.model_files import ModelFiles
    from utils.run_dir import RunDir
    from utils.tree import Tree

PREVIEW_SIDE = 256
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(slots=True)
class Archive:
    """Turns the state of a run into what the checkpoint writer writes.

    The state is a tree with "networks" (name -> tensors of all three, fp32), "answers" (name -> tensors that an
    optimizer answers with in their place), and, with EMA, "ema" (name -> averaged tensors); what else it holds is the
    training's own business.

    Args:
        files: configurations and tokenizer, marked with how the model is trained.
        options: resolved, flat; part of every record.
        extra: more for the record, plain JSON.
    """

    run: RunDir
    project: str
    seed: int
    files: ModelFiles
    save: SaveOptions
    options: Mapping[str, Any]
    extra: Mapping[str, Any]

    def saves(self, progress: Progress, kind: Kind = "", *, finished: bool = False, ema: bool = False) -> list[Save]:
        """The checkpoint of the plain weights, and with `ema` that of the average beside it.

        The average comes first: the plain checkpoint carries the state, so once it is there both are.
        """
        record = Record(
            project=self.project,
            progress=progress,
            seed=self.seed,
            kind=kind,
            finished=finished,
            run=self.run.name,
            versions=library_versions(),
            extra={"options": dict(self.options), **self.extra},
        )
        plain = self._save(record)
        return [self._save(replace(record, ema=True)), plain] if ema else [plain]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of exports."""
        return torch.float32 if self.save.save_full_precision else torch.float16

    def _save(self, record: Record) -> Save:
        # The options may change between epochs; this save keeps those of its time.
        dtype = self.dtype
        return Save(
            record=record,
            exports=partial(_write_folder, self.files, dtype, record.ema),
            check=partial(_check_folder, dtype, record.ema),
            also=None if self.save.no_save_ckpt else partial(self._write_single_file, record, dtype),
            keep_state=not record.ema,
        )

    def single_file(self, record: Record) -> Path:
        """Where the single file of a checkpoint goes."""
        folder = Path() if self.save.save_ckpt_dir is None else Path(self.save.save_ckpt_dir)
        return folder / f"{record.name}.safetensors"

    def _write_single_file(self, record: Record, dtype: torch.dtype, state: Tree) -> None:
        path = self.single_file(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = exported(state, record.ema)
        dtype = fitting_dtype(weights, dtype)
        metadata = modelspec(
            self.files,
            title=record.name,
            date=datetime.datetime.now(datetime.UTC),
            resolution=int(self.options["resolution"]),
            trigger_words=_words(self.save.trigger_words),
            options=self.options,
            preview=preview(self.run.samples),
        )
        with atomic_file(path, self.run.name) as unproven:
            written = write_single_file(unproven, weights, self.files, dtype=dtype, metadata=metadata)
            check_single_file(unproven, weights, self.files, dtype)
            for beside in written[1:]:
                rename(beside, path.with_suffix(beside.suffix))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers come from."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",") if word.strip()]


def preview(samples: Path) -> bytes | None:
    """The first of the newest samples, small, as a JPEG; `None` where there is none."""
    from PIL import Image

    # Numbers of updates have five digits or more.
    newest = sorted(samples.glob("gs*-000-*.jpg"), key=lambda path: (path.name.find("-"), path.name))[-1:]
    try:
        for path in newest:
            with Image.open(path) as picture:
                picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
                picture.info.clear()  # the prompt is in there, and nobody asked to give it away with the model
                small = io.BytesIO()
                picture.convert("RGB").save(small, "JPEG", quality=85)
                return small.getvalue()
    except OSError:
        return None
    return None


def exported(state: Tree, ema: bool) -> dict[str, dict[str, Tensor]]:
    """The weights of the three networks in `state` as other programs are to have them: plain, or averaged."""
    over: dict[str, dict[str, Tensor]] = state["ema"] if ema else state["answers"]
    return {name: {**tensors, **over.get(name, {})} for name, tensors in state["networks"].items()}


def fitting_dtype(weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where a weight is too large for it: better a big file than none."""
    # Both ends at once is many times faster than the magnitudes, and takes no memory.
    ends = [torch.stack(tensor.aminmax()).float() for tensors in weights.values() for tensor in tensors.values()]
    largest = float(torch.stack(ends).abs().max())
    return dtype if largest <= torch.finfo(dtype).max else torch.float32


def _write_folder(files: ModelFiles, dtype: torch.dtype, ema: bool, folder: Path, state: Tree) -> None:
    weights = exported(state, ema)
    fitting = fitting_dtype(weights, dtype)
    if fitting != dtype:
        LOGGER.warning("weights have grown too large for fp16, so they are saved in fp32; lower lr")
    write_folder(folder, weights, files, dtype=fitting)


def _check_folder(dtype: torch.dtype, ema: bool, folder: Path, state: Tree) -> None:
    weights = exported(state, ema)
    check_folder(folder, weights, fitting_dtype(weights, dtype))
