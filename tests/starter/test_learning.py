"""A short `make train` must teach something; the same run, broken, must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from starter.exam import answers, new_questions, open_pipeline
from starter.grader import likeness
from starter.make_pictures import TAUGHT
from starter.world import ZORP

STARTER = Path(__file__).resolve().parents[2] / "starter"
PICTURES = STARTER / "pictures" / "zorps"
UPDATES = 120
# Mean overlap of 12 pictures with the new shape in the right colour, on pairs of colour and ground that were not shown.
BOUND = 0.60


def score(model: Path) -> float:
    questions = new_questions(12, seen=TAUGHT)
    pictures = answers(open_pipeline(model), questions, steps=15)
    found = [
        likeness(picture, shape=ZORP, colour=asked.colour) for asked, picture in zip(questions, pictures, strict=True)
    ]
    return sum(found) / len(found)


def learn(out: Path, model: Path, pictures: Path, **changes: object) -> Path:
    """The checkpoint of a short run on starter/train.json with `changes`."""
    import train

    options = json.loads((STARTER / "train.json").read_text())
    (out / "samples.json").write_text(json.dumps({"generate_pretrain_samples": False}))
    options |= {
        "resume_ckpt": str(model),
        "data_root": str(pictures),
        "logdir": str(out / "logs"),
        "optimizer_config": str(STARTER / "optimizer.json"),
        "sample_prompts": str(out / "samples.json"),
        "sample_steps": 10**6,
        "no_save_ckpt": True,
        "data_index": "off",
        "max_steps": UPDATES,
        "lr": 8e-4,
        "lr_decay_steps": UPDATES,
        "device": "cpu",
    } | changes
    (out / "train.json").write_text(json.dumps(options))
    assert train.main(["--config", str(out / "train.json")]) == 0
    (checkpoint,) = (out / "logs").glob("*/ckpts/last-*")
    return checkpoint


def test_a_short_run_learns_the_new_shape(tmp_path: Path) -> None:
    before = score(STARTER / "model")
    after = score(learn(tmp_path, STARTER / "model", PICTURES))
    print(f"before {before:.3f}, after {after:.3f}")
    assert before < BOUND <= after


def rate_zero(out: Path) -> Path:
    return learn(out, STARTER / "model", PICTURES, lr=0.0)


def captions_shuffled(out: Path) -> Path:
    """Every picture gets the caption of one in another colour."""
    folder = out / "pictures"
    folder.mkdir()
    pictures = sorted(path for path in PICTURES.rglob("*") if path.suffix in {".png", ".jpg", ".webp"})
    for i, path in enumerate(pictures):
        other = pictures[(i + 4) % len(pictures)]
        name = f"{i:02}{path.suffix}"
        shutil.copy(path, folder / name)
        for suffix in (".txt", ".yaml"):
            if other.with_suffix(suffix).exists():
                shutil.copy(other.with_suffix(suffix), (folder / name).with_suffix(suffix))
    return learn(out, STARTER / "model", folder)


def noise_of_the_wrong_scale(out: Path) -> Path:
    """Latents four times too large beside the noise, as a forgotten or foreign scaling factor makes them."""
    shutil.copytree(STARTER / "model", out / "model")
    config = out / "model" / "vae" / "config.json"
    true = config.read_text()
    config.write_text(json.dumps(json.loads(true) | {"scaling_factor": 4 * json.loads(true)["scaling_factor"]}))
    checkpoint = learn(out, out / "model", PICTURES)
    (checkpoint / "vae" / "config.json").write_text(true)
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("broken", [rate_zero, captions_shuffled, noise_of_the_wrong_scale])
def test_a_broken_trainer_stays_below_the_bound(broken: Callable[[Path], Path], tmp_path: Path) -> None:
    found = score(broken(tmp_path))
    print(f"{broken.__name__}: {found:.3f}")
    assert found < BOUND
