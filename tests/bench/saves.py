"""How long training stands still for a save, and how long the writing takes: `python -m tests.bench.saves [GIB]`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.faults import save_jobs
from utils.checkpoint import prove
from utils.tree import Tree
from utils.writer import CheckpointWriter, Save


def _export(folder: Path, tree: Tree) -> None:
    (folder / "unet").mkdir()
    save_file({name: weight.half() for name, weight in tree["unet"].items()}, folder / "unet" / "model.safetensors")


def main() -> None:
    """Print the seconds of three saves of fp32 weights and two moments, `GIB` in all, with a half-precision export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gib", type=float, nargs="?", default=1.0)
    parser.add_argument("--folder", default=None, help="on the disk to be measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = int(given.gib * 2**30 / 4 / 3 / 30 / 1024)
    generator = torch.Generator().manual_seed(0)
    tree = {
        kind: {f"layer.{n}": torch.randn(rows, 1024, generator=generator) for n in range(30)}
        for kind in ("unet", "exp_avg", "exp_avg_sq")
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        plain = time.perf_counter()
        with (Path(name) / "plain.pt").open("wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())
        print(f"torch.save in place, synced: {time.perf_counter() - plain:.2f} s of standing still")
        (Path(name) / "plain.pt").unlink()
        for update in range(1, 4):
            with CheckpointWriter(Path(name)) as writer:
                writer.save(tree, [Save(save_jobs.record(update), _export)])
                (result,) = writer.close()
            assert result.error is None, result.error
            print(f"save {update}: waited {result.wait_seconds:.2f} s, written in {result.write_seconds:.2f} s")
        assert result.folder is not None
        started = time.perf_counter()
        prove(result.folder)
        print(f"reading all of it back, from the disk: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
