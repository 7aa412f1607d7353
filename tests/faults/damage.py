"""Flipped bits and cut files in a checkpoint: all must be noticed, and the older checkpoint used."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import save_jobs as jobs
from utils.checkpoint import STATE, load_training_state, prove
from utils.errors import UserError
from utils.findlast import find_last
from utils.manifest import MANIFEST, _manifest_text
from utils.run_dir import create_run_dir
from utils.writer import CheckpointWriter


@dataclass
class DamageFigures:
    """Counts over all damages; of `searched` whole searches, `older_used` found the older one and named the newer."""

    damaged: int = 0
    detected: int = 0
    searched: int = 0
    older_used: int = 0


def damage(root: Path, count: int, seed: int, *, cut: bool = False, search_every: int = 10) -> DamageFigures:
    """Flip one bit, or cut one file, of the newer of two checkpoints, `count` times, mending it each time."""
    run = create_run_dir(root, jobs.PROJECT)
    writer = CheckpointWriter(run.ckpts)
    for update in (1, 2):
        assert writer.save_now(*jobs.save(update, size=64))[0].error is None
    newest = run.ckpts / jobs.record(2).name
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    chance, figures = random.Random(seed), DamageFigures()
    for number in range(count):
        # Small files are as likely as large ones: a manifest must be hit as often as the weights.
        path = files[number % len(files)]
        good = path.read_bytes()
        path.write_bytes(_cut(good, chance) if cut else _flip(good, chance))
        figures.damaged += 1
        figures.detected += not _proves(newest)
        if number % search_every == 0:
            found = find_last(root, jobs.PROJECT)
            figures.searched += 1
            named = found is not None and [p for p, reason in found.skipped if p == newest and reason]
            figures.older_used += bool(named) and found is not None and found.progress.update == 1
        path.write_bytes(good)
    assert _proves(newest), "mended"
    return figures


JUNK: list[Any] = [
    None, True, -1, 0, 2**70, 1e308, "", "../../x", "\ud800", [], {}, [[]], {"": {}}, {"tensor": "x"}, {"dict": [[1]]},
    {"int": "zz"}, {"float": "00"}, {"text": "zz"}, {"tuple": 5}, {"tensor": [], "dtype": "float32", "shape": "x"},
    {"tensor": "unet/conv.bias", "dtype": "int8", "shape": [-1]}, "save", [1] * 50, {"bytes": -1, "sha256": "0"},
]  # fmt: skip


@dataclass
class ForgedFigures:
    """Counts over all forgeries: `refused` in words, `taken` as harmless, `crashed` with anything but words."""

    forged: int = 0
    refused: int = 0
    taken: int = 0
    crashed: int = 0
    crashes: tuple[str, ...] = ()


def forge(root: Path, count: int, seed: int) -> ForgedFigures:
    """Put junk into a random place of a manifest or a state, with checksums that match, and read everything."""
    run = create_run_dir(root, jobs.PROJECT)
    assert CheckpointWriter(run.ckpts).save_now(*jobs.save(1, size=16))[0].error is None
    folder = run.ckpts / jobs.record(1).name
    kinds = [folder / MANIFEST, folder / STATE / MANIFEST, folder / STATE / "state.json"]
    chance, figures = random.Random(seed), ForgedFigures()
    for number in range(count):
        path = kinds[number % len(kinds)]
        good = path.read_text()
        content = _spoil(json.loads(good), chance)
        if path.name == MANIFEST and isinstance(content, dict):
            content.pop("checksum", None)
            path.write_text(_manifest_text(content))
        else:
            path.write_text(json.dumps(content))
        figures.forged += 1
        try:
            found = find_last(root, jobs.PROJECT)
            load_training_state(folder if found is None else found.folder, verify=False)
            figures.taken += found is not None
            figures.refused += found is None
        except UserError:
            figures.refused += 1
        except Exception as error:
            figures.crashed += 1
            figures.crashes = tuple(sorted({*figures.crashes, f"{type(error).__name__} {path.name}: {error}"[:200]}))
        path.write_text(good)
    return figures


def _spoil(tree: Any, chance: random.Random) -> Any:
    """`tree` with one node, at a random depth, replaced or removed."""
    if isinstance(tree, dict | list) and tree and chance.random() < 0.8:
        key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if chance.random() < 0.1:
            del tree[key]
        else:
            tree[key] = _spoil(tree[key], chance)
        return tree
    return chance.choice(JUNK)


def _flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _proves(folder: Path) -> bool:
    try:
        prove(folder, from_disk=False)
    except UserError:
        return False
    return True
