"""Flipped bits and cut files in a checkpoint: all must be noticed, and the older checkpoint used."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tests.faults import save_jobs as jobs
from utils.checkpoint import prove
from utils.errors import UserError
from utils.findlast import find_last
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
