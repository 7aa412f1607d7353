"""Checkpoints at small sizes for the fault tests: what a run saves, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from utils.checkpoint import Kind, Progress, Record
from utils.writer import Save

PROJECT = "proj"


def state(update: int, size: int = 500) -> dict[str, Any]:
    """A training state that is a function of the update, so that any process can tell whether it is right."""
    generator = torch.Generator().manual_seed(update)
    return {
        "unet": {
            "conv.weight": torch.randn(size, 8, generator=generator),
            "conv.bias": torch.full((8,), float(update)),
        },
        "optimizer": {"state": {0: {"step": torch.tensor(float(update))}}, "param_groups": [{"lr": 1e-5 * update}]},
        "progress": {"update": update},
    }


def record(update: int, kind: Kind = "", **more: Any) -> Record:
    return Record(PROJECT, Progress(update, update // 10, update % 10, update * 4), seed=555, kind=kind, **more)


def exports(folder: Path, tree: dict[str, Any]) -> None:
    (folder / "unet").mkdir()
    save_file({k: v.half() for k, v in tree["unet"].items()}, folder / "unet" / "model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def check(folder: Path, tree: dict[str, Any]) -> None:
    loaded = load_file(folder / "unet" / "model.safetensors")
    for name, weight in tree["unet"].items():
        if not torch.equal(loaded[name], weight.half()):
            raise RuntimeError(f"{name} reads back differently")


def save(update: int, kind: Kind = "", size: int = 500, **more: Any) -> tuple[dict[str, Any], list[Save]]:
    """The arguments of `CheckpointWriter.save` for the run at `update`."""
    return state(update, size), [Save(record(update, kind, **more), exports, check)]
