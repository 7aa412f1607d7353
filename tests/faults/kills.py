"""kill -9 in the middle of saves, ours and two naive ones, and what is left on the disk each time."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults import save_jobs as jobs
from utils.checkpoint import load_training_state, prove
from utils.errors import UserError
from utils.findlast import find_last
from utils.run_dir import open_run_dir
from utils.saving import Retention
from utils.tree import same_tree, save_tree
from utils.writer import CheckpointWriter

STATE_SIZE = 20_000
"""Rows of the state: 640 kB, so that a save takes some ten milliseconds."""


@dataclass
class KillFigures:
    """Counts over all kills.

    Args:
        unusable: kills after which something that bears a checkpoint's name cannot be used.
        lost: kills after which a save that had been reported as done was not found.
        wrong: kills after which the state that was found was not the one saved.
        saves: saves that were reported as done.
        left_behind: hidden leftovers after the last start.
    """

    kills: int = 0
    unusable: int = 0
    lost: int = 0
    wrong: int = 0
    saves: int = 0
    left_behind: int = 0


def kill_during_saves(root: Path, count: int, seed: int, *, longest_seconds: float = 0.6) -> KillFigures:
    """Kill a process that does nothing but save, `count` times, and go on each time from what it left."""
    run = open_run_dir(_folder(root / f"{jobs.PROJECT}-run"))
    chance, figures = random.Random(seed), KillFigures()
    update = 0
    for _ in range(count):
        told = _start_and_kill(_save_for_ever, run.folder, update, chance.uniform(0.005, longest_seconds))
        figures.kills += 1
        figures.saves += len(told)
        figures.unusable += any(not _proves(f) for f in run.ckpts.iterdir() if not f.name.startswith("."))
        found = find_last(root, jobs.PROJECT)
        reached = 0 if found is None else found.progress.update
        figures.lost += reached < max(told, default=update)
        if found is not None:
            figures.wrong += not same_tree(load_training_state(found.folder), jobs.state(reached, STATE_SIZE))
        update = reached
    CheckpointWriter(run.ckpts)
    figures.left_behind = sum(f.name.startswith(".") for f in run.ckpts.iterdir())
    return figures


def kill_during_naive_saves(
    root: Path, count: int, seed: int, saver: Callable[[Path, int, Connection], None], *, longest_seconds: float = 0.6
) -> KillFigures:
    """The same kills for a saver that writes in place."""
    chance, figures = random.Random(seed), KillFigures()
    for number in range(count):
        folder = _folder(root / f"{number:04}")
        told = _start_and_kill(saver, folder, 0, chance.uniform(0.005, longest_seconds))
        figures.kills += 1
        figures.saves += len(told)
        figures.unusable += any(not _naive_usable(path) for path in folder.iterdir())
    return figures


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _start_and_kill(
    body: Callable[[Path, int, Connection], None], folder: Path, update: int, seconds: float
) -> list[int]:
    """Run `body` for `seconds` after it is ready, kill it, and return the updates it had reported as saved."""
    # fork, because a fresh interpreter would take a hundred times as long to start as to kill.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=body, args=(folder, update, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == -1
    time.sleep(seconds)
    process.kill()
    process.join()
    told = []
    try:
        while True:
            told.append(ours.recv())
    except (EOFError, OSError):
        return told
    finally:
        ours.close()


def _proves(folder: Path) -> bool:
    try:
        prove(folder, from_disk=False)
    except UserError:
        return False
    return True


def _save_for_ever(folder: Path, update: int, tell: Connection) -> None:
    run = open_run_dir(folder)
    with run.lock(), CheckpointWriter(run.ckpts, Retention(keep_last_n=3)) as writer:
        tell.send(-1)
        while True:
            update += 1
            # Every third update is saved twice, so that replacing one is killed as well.
            for _ in range(1 + (update % 3 == 0)):
                state, saves = jobs.save(update, size=STATE_SIZE)
                writer.save(state, saves)
                for result in writer.close():
                    if result.error is not None:
                        os._exit(1)
                    tell.send(update)


def save_naively_with_torch(folder: Path, update: int, tell: Connection) -> None:
    """torch.save over the same file, as most trainers do."""
    tell.send(-1)
    while True:
        update += 1
        torch.save(jobs.state(update, STATE_SIZE), folder / "last.pt")
        tell.send(update)


def save_naively_as_folder(folder: Path, update: int, tell: Connection) -> None:
    """A folder a save, written in place under its final name, the oldest removed after each."""
    tell.send(-1)
    while True:
        update += 1
        state, target = jobs.state(update, STATE_SIZE), _folder(folder / f"gs{update:05}")
        save_file(state["unet"], target / "unet.safetensors")
        save_tree(target, "state", state)
        tell.send(update)
        if update > 3:
            for path in (old := folder / f"gs{update - 3:05}").iterdir():
                path.unlink()
            old.rmdir()


def _naive_usable(path: Path) -> bool:
    try:
        if path.is_file():
            torch.load(path, weights_only=True)
        else:
            load_file(path / "unet.safetensors")
            load_file(path / "state.safetensors")
            (path / "state.json").read_text().index("tree_version")
    except Exception:
        return False
    return True
