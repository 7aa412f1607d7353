"""Sample pictures on disk and on the board, and what happens when drawing fails."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from starter.make_model import random_model
from utils.gallery import EXIF_BLOCK, USER_COMMENT, Gallery, file_stem, file_words, strip
from utils.logs import close_logs, open_console
from utils.models import Models, load_models
from utils.prompts import SampleJob, SamplePlan
from utils.tracking import Tracker

JOB = SampleJob(2, "a red circle", "", 7, 64, 64, (7.0, 4.0))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return load_models(random_model(tmp_path_factory.mktemp("model") / "sd"))


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    open_console(stream)
    yield stream
    close_logs()


def gallery(models: Models, tmp_path: Path, samples: Any) -> Gallery:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps({"num_inference_steps": 2, "cfgs": [7, 1], **samples}), encoding="utf-8")
    plan = SamplePlan(str(path), every=1, resolution=64, step=8, seed=5)
    return Gallery(models, plan, Tracker(tmp_path), tmp_path / "samples")


def test_names_are_safe_and_counted_in_bytes() -> None:
    assert file_stem(250, JOB) == "gs00250-002-a-red-circle"
    assert file_stem(250, JOB, "ema") == "gs00250-002-ema-a-red-circle"
    assert file_words("../../etc/passwd\n<b>:*?", 50) == "etc-passwd-b"
    assert file_words("日本語の長い文" * 40, 100) == ("日本語の長い文" * 40)[:33]
    assert file_words("...", 50) == "empty"


def test_a_strip_shows_every_guidance_below_its_picture() -> None:
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    whole = strip(pictures, (7.0, 1.01))
    assert whole.size[0] == 128
    assert whole.crop((0, 0, 64, 48)).tobytes() == pictures[0].tobytes()
    assert whole.crop((64, 0, 128, 48)).tobytes() == pictures[1].tobytes()
    bands = [whole.crop((left, 48, left + 64, whole.height)).tobytes() for left in (0, 64)]
    assert bands[0] != bands[1]


def test_picture_text_and_board(models: Models, tmp_path: Path) -> None:
    samples = [{"prompt": "a cat", "negative_prompt": "a dog", "seed": 3}, {"random_caption": True}]
    path, other = gallery(models, tmp_path, {"samples": samples, "prompt_weights": True}).draw(5, ["a (cap)"])
    assert "prompt weights: no\n" in other.with_suffix(".txt").read_text(encoding="utf-8")
    assert path.name == "gs00005-000-a-cat.jpg"
    text = path.with_suffix(".txt").read_text(encoding="utf-8")
    for line in ("prompt: a cat", "negative prompt: a dog", "seed: 3", "size: 64 x 64", "guidance: 7, 1", "steps: 2"):
        assert f"{line}\n" in text
    assert "prompt weights: yes\n" in text
    with Image.open(path) as picture:
        assert picture.width == 128
        assert b"a cat\nNegative prompt: a dog\nSteps: 2" in picture.info["comment"]
        comment = picture.getexif().get_ifd(EXIF_BLOCK)[USER_COMMENT]
        assert comment[8:].decode("utf-16-be").endswith("Seed: 3, Size: 64x64")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path)).Reload()
    assert seen.Tags()["images"] == ["sample_000_a_cat", "sample_001_a_cap"]


def test_ema_and_plain_side_by_side(models: Models, tmp_path: Path) -> None:
    hall = gallery(models, tmp_path, {"samples": [{"prompt": "a cat"}]})
    own = {name: value.clone() for name, value in models.unet.state_dict().items()}
    faded = {name: 0.5 * parameter.detach() for name, parameter in models.unet.named_parameters()}
    plain, same, ema = hall.draw(1, [], {"": {}, "same": {"unet": own}, "ema": {"unet": faded}})
    assert ema.name == "gs00001-000-ema-a-cat.jpg"
    pictures = [Image.open(path).tobytes() for path in (plain, same, ema)]
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    assert all(torch.equal(value, own[name]) for name, value in models.unet.state_dict().items())


def test_one_sample_that_fails_does_not_take_the_others(models: Models, tmp_path: Path, console: io.StringIO) -> None:
    hall = gallery(models, tmp_path, {"samples": [{"prompt": "good"}, {"prompt": "bad", "size": [64, 72]}]})
    with_hook = models.unet.conv_in.register_forward_pre_hook(_refuse_tall)
    try:
        written = hall.draw(1, [])
    finally:
        with_hook.remove()
    assert [path.name for path in written] == ["gs00001-000-good.jpg"]
    assert "the sample 'bad' after update 1 failed: RuntimeError: too tall" in console.getvalue().replace("\\'", "'")


def _refuse_tall(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
    if arguments[0].shape[-2] > 8:
        raise RuntimeError("too tall")


def test_a_folder_that_cannot_be_written_ends_nothing(models: Models, tmp_path: Path, console: io.StringIO) -> None:
    (tmp_path / "samples").write_text("a file in the way")
    hall = gallery(models, tmp_path, {"samples": [{"prompt": "x"}]})
    assert hall.draw(1, []) == []
    assert "the samples after update 1 failed" in console.getvalue()
