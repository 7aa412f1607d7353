"""Whole runs for tests: a tiny real model, a few photographs, train.main in this process, and what came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import training.loop
from training.session import Session
from utils.checkpoint import list_checkpoints, load_training_state

BASE: dict[str, Any] = {
    "resolution": 64,
    "bucket_step": 16,
    "batch_size": 2,
    "grad_accum": 2,
    "max_epochs": 3,
    "lr": 1e-3,
    "lr_scheduler": "cosine",
    "log_step": 2,
    "num_workers": 0,
    "sample_steps": 1000,
    "no_save_ckpt": True,
    "project_name": "job",
    "data_index": "off",
    "device": "cpu",
}

# As it is before any test has put something around it.
AFTER_UPDATE = training.loop.after_update


@dataclass(frozen=True, slots=True)
class World:
    """What jobs learn from: a model folder, a picture folder, both read-only."""

    model: Path
    pictures: Path


def make_world(folder: Path, *, prediction_type: str = "epsilon", pictures: int = 7) -> World:
    """A tiny model and the first `pictures` photographs, in three aspect ratios."""
    from starter.make_model import random_model
    from tests.photos import make_photo_folder

    model = random_model(folder / "model", prediction_type=prediction_type)
    made = sorted(make_photo_folder(folder / "all"))
    (folder / "pictures").mkdir()
    # Every third keeps the mix of shapes.
    for path in made[:pictures]:
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, folder / "pictures" / file.name)
    samples = {"num_inference_steps": 2, "cfgs": [4], "samples": [{"prompt": "a cat"}]}
    (folder / "prompts.json").write_text(json.dumps(samples), encoding="utf-8")
    return World(model, folder / "pictures")


def arguments(world: World, logdir: Path, **options: Any) -> list[str]:
    """The command line of a job; an option that is `None` is left out."""
    values = {
        **BASE,
        "resume_ckpt": world.model,
        "data_root": world.pictures,
        "logdir": logdir,
        "sample_prompts": world.model.parent / "prompts.json",
        **options,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_job(world: World, logdir: Path, **options: Any) -> int:
    """Run train.py's main in this process; its exit code."""
    import train

    return train.main(arguments(world, logdir, **options))


def stop_after(monkeypatch: pytest.MonkeyPatch, update: int | None) -> None:
    """Ask for a stop when `update` updates are done, as Ctrl-C would; `None` lets runs go on to their end."""
    original = AFTER_UPDATE

    def after(session: Session) -> None:
        original(session)
        if session.progress.update == update:
            session.stop.request()

    monkeypatch.setattr(training.loop, "after_update", after if update is not None else original)


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[[Session], None]) -> None:
    """Call `look` after every update."""
    original = training.loop.after_update

    def after(session: Session) -> None:
        original(session)
        look(session)

    monkeypatch.setattr(training.loop, "after_update", after)


def run_folder(logdir: Path) -> Path:
    """The one run folder in `logdir`."""
    (folder,) = [path for path in logdir.iterdir() if path.is_dir()]
    return folder


def final_state(logdir: Path) -> dict[str, Any]:
    """The training state of the newest checkpoint."""
    newest = list_checkpoints(run_folder(logdir) / "ckpts")[0]
    state: dict[str, Any] = load_training_state(newest.folder)
    return state
