"""Five captions swapped between pictures of the starter's world come out on top of the ledger."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from random import Random

import pytest

import train

STARTER = Path(__file__).parent.parent / "starter"

pytestmark = pytest.mark.slow


def swap_captions(folder: Path, seed: int) -> set[str]:
    """Give five pictures each another one's caption, of another colour; returns the names of their files."""
    captions = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    chance = Random(seed)
    while True:
        chosen = chance.sample(list(captions), 5)
        pairs = list(zip(chosen, [*chosen[1:], chosen[0]], strict=True))
        if all(captions[one].split()[1] != captions[other].split()[1] for one, other in pairs):
            break
    for one, other in pairs:
        one.write_text(captions[other], encoding="utf-8")
    return {path.stem for path in chosen}


@pytest.mark.parametrize(("seed", "epochs", "at_least"), [(1, 4, 4), (2, 4, 4), (1, 8, 5), (2, 8, 5)])
def test_swapped_captions_are_found(tmp_path: Path, seed: int, epochs: int, at_least: int) -> None:
    shutil.copytree(STARTER / "pictures", tmp_path / "pictures")
    swapped = swap_captions(tmp_path / "pictures" / "zorps", seed)
    optimizer = {"base": {"optimizer": "adamw", "lr": 1e-5, "lr_scheduler": "constant"}, "text_encoder_lr_scale": 1.0}
    (tmp_path / "optimizer.json").write_text(json.dumps(optimizer), encoding="utf-8")
    options = {
        "config": STARTER / "train.json",
        "resume_ckpt": STARTER / "model",
        "data_root": tmp_path / "pictures",
        "optimizer_config": tmp_path / "optimizer.json",
        "sample_prompts": tmp_path / "none.txt",
        "logdir": tmp_path / "logs",
        "max_epochs": epochs,
        "sample_steps": 100_000,
        "no_save_ckpt": "true",
    }
    assert train.main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    rows = list(csv.DictReader((run / "loss_by_image.csv").open(encoding="utf-8")))
    found = [Path(row["image"]).stem for row in rows[:10]]
    assert len(swapped & set(found)) >= at_least, f"{sorted(swapped)} in {found}"
