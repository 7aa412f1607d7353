from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from starter.grader import grade
from starter.make_pictures import TAUGHT, make_pictures
from starter.world import BACKGROUNDS, COLOURS, ZORP

STARTER = Path(__file__).resolve().parents[2] / "starter"
PICTURES = STARTER / "pictures"
SUFFIXES = {".png", ".jpg", ".webp"}


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def said(picture: Path) -> str:
    text, settings = picture.with_suffix(".txt"), picture.with_suffix(".yaml")
    if text.exists():
        return text.read_text()
    return settings.read_text() if settings.exists() else picture.stem


def test_the_script_draws_what_is_committed(tmp_path: Path) -> None:
    count = make_pictures(tmp_path)
    again, kept = ({path.relative_to(root) for path in root.rglob("*")} for root in (tmp_path, PICTURES))
    assert again == kept
    assert count == len(pictures(PICTURES))
    for path in pictures(tmp_path):
        if path.suffix == ".png":
            with Image.open(path) as drawn, Image.open(PICTURES / path.relative_to(tmp_path)) as committed:
                assert drawn.tobytes() == committed.tobytes(), path.name


def test_there_are_forty_to_eighty_in_three_aspect_ratios() -> None:
    found = pictures(PICTURES)
    assert 40 <= len(found) <= 80
    ratios = set()
    for path in found:
        with Image.open(path) as picture:
            ratios.add(round(picture.width / picture.height, 2))
    assert ratios == {1.0, 1.67, 0.6}


def test_captions_say_what_the_pictures_show() -> None:
    for path in pictures(PICTURES):
        with Image.open(path) as picture:
            found = grade(picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX))
        words = said(path).replace(",", " ").split()
        assert {found.shape, found.colour, found.background} <= set(words), path.name


def test_the_asked_pairs_are_in_no_caption() -> None:
    taught = {
        (colour, ground)
        for path in pictures(PICTURES / "zorps")
        for colour in COLOURS
        for ground in BACKGROUNDS
        if colour in said(path) and ground in said(path)
    }
    assert taught == set(TAUGHT)
    assert not any(ZORP in said(path) for path in pictures(PICTURES / "known"))
    assert len(COLOURS) * len(BACKGROUNDS) - len(taught) == 18


def test_the_options_are_known_and_the_files_are_there() -> None:
    options = json.loads((STARTER / "train.json").read_text())
    root = STARTER.parent
    for key in ("resume_ckpt", "data_root", "optimizer_config", "sample_prompts"):
        assert (root / options[key]).exists(), key
