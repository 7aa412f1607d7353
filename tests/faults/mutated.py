"""Model files and option files changed at random: words or a sound reading come out, and nothing of them is run."""

from __future__ import annotations

import json
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.inputs import read_inputs
from utils.errors import UserError
from utils.model_files import read_model_files
from utils.pickles import read_pickle
from utils.weights import read_safetensors

# What a program does that runs something, or talks to somebody.
ALARMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")
JUNK = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"null",
    b"-1",
    b"1e999",
    b'"',
    b"{",
    b"]",
    b"[" * 999,
    b"../../x",
    b"9" * 400,
    b"true",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "train.json": {
        "data_root": "input", "batch_size": 2, "lr": 1e-6, "resolution": 512, "flip_p": 0.5, "project_name": "mine",
        "optimizer_config": "optimizer.json", "validation_config": "validation.json", "sample_prompts": "samples.json",
    },
    "optimizer.json": {
        "base": {"optimizer": "adamw", "lr": 1e-6, "betas": [0.9, 0.999], "lr_scheduler": "cosine"},
        "text_encoder_overrides": {"lr": None}, "text_encoder_freezing": {"unfreeze_last_n_layers": 2},
    },
    "validation.json": {"validate_training": True, "val_split_mode": "automatic", "auto_split_proportion": 0.1},
    "samples.json": {"cfgs": [7, 4], "samples": [{"prompt": "a cat", "size": [512, 512], "seed": 3}]},
}  # fmt: skip


@dataclass
class MutatedFigures:
    """Counts over all files: `refused` in words, `taken` as sound, `crashed` with anything else, `ran` something."""

    mutated: int = 0
    refused: int = 0
    taken: int = 0
    crashed: int = 0
    ran: int = 0
    crashes: tuple[str, ...] = ()


class _Trap:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "sprung")


_alarms: list[str] = []
_hooked: list[bool] = []


def _hook(event: str, _arguments: tuple[Any, ...]) -> None:
    if event in ALARMS:
        _alarms.append(event)


def mutate(root: Path, model: Path, count: int, seed: int) -> MutatedFigures:
    """Change a file at a random place, `count` times, and read it as a run would; `model` is a Diffusers folder."""
    canary = root / "canary"
    readers = {**_weights(root, canary), **_configurations(root, model), **_options(root)}
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    chance, figures = random.Random(seed), MutatedFigures()
    _alarms.clear()
    paths = sorted(readers)
    for number in range(count):
        path = paths[number % len(paths)]
        good = path.read_bytes()
        path.write_bytes(_changed(good, chance))
        figures.mutated += 1
        try:
            readers[path]()
            figures.taken += 1
        except UserError:
            figures.refused += 1
        except Exception as error:
            figures.crashed += 1
            what = f"{path.name}: {type(error).__name__}: {error}"[:200]
            figures.crashes = tuple(sorted({*figures.crashes, what}))[:10]
        path.write_bytes(good)
        figures.ran += canary.exists() + len(_alarms)
        canary.unlink(missing_ok=True)
        _alarms.clear()
    return figures


def _changed(data: bytes, chance: random.Random) -> bytes:
    """`data` with up to three places overwritten, taken out, doubled, cut or filled with what parsers dislike."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(data) + 1)
        length = chance.choice([0, 1, 1, 4, 30])
        filling = chance.choice([bytes([chance.randrange(256)]), chance.choice(JUNK), data[at : at + 40] * 2])
        data = data[:at] + filling + (b"" if chance.random() < 0.05 else data[at + length :])
    return data


def _weights(root: Path, canary: Path) -> dict[Path, Callable[[], object]]:
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16)}
    safe, archive, legacy = root / "a.safetensors", root / "b.ckpt", root / "c.ckpt"
    save_file(tensors, safe)
    # Not torch's own saving, because it compresses nothing and pads: a change would seldom hit the pickle.
    torch.save({"state_dict": tensors, "trap": _Trap(canary)}, root / "whole.ckpt")
    with zipfile.ZipFile(root / "whole.ckpt") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    (pickled,) = [name for name in members if name.endswith("data.pkl")]
    archive.write_bytes(members[pickled])
    legacy.write_bytes(pickle.dumps({"state_dict": {"a": 1}, "trap": _Trap(canary)}))

    def read_archive() -> object:
        with zipfile.ZipFile(root / "changed.ckpt", "w") as file:
            for name, data in {**members, pickled: archive.read_bytes()}.items():
                file.writestr(name, data)
        return read_pickle(root / "changed.ckpt")

    return {safe: lambda: read_safetensors(safe), archive: read_archive, legacy: lambda: read_pickle(legacy)}


def _configurations(root: Path, model: Path) -> dict[Path, Callable[[], object]]:
    copy = root / "model"
    names = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    for path in model.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (copy / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(model)).write_bytes(path.read_bytes())
    return {copy / name: lambda: read_model_files(copy) for name in names}


def _options(root: Path) -> dict[Path, Callable[[], object]]:
    for name, content in OPTIONS.items():
        named = {key: str(root / str(value)) if str(value) in OPTIONS else value for key, value in content.items()}
        (root / name).write_text(json.dumps(named, indent=1), encoding="utf-8")
    return {root / name: lambda: read_inputs(["--config", str(root / "train.json")]) for name in OPTIONS}
