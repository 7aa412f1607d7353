"""Metadata of single files: what the standard asks for, and nothing that is nobody's business."""

from __future__ import annotations

import base64
import io
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.archive import preview
from utils.modelspec import MAX_PREVIEW_BYTES, modelspec, public_options
from utils.presets import preset

DATE = datetime(2026, 11, 23, 5, 0, tzinfo=timezone(timedelta(hours=2)))
JPEG = b"\xff\xd8\xff\xe0" + b"x" * 100


@pytest.mark.parametrize(
    ("kind", "prediction_type", "architecture", "word"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1", "epsilon"),
        ("sd1", "v_prediction", "stable-diffusion-v1", "v"),
        ("sd2", "epsilon", "stable-diffusion-v2-512", "epsilon"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v", "v"),
    ],
)
def test_required_keys_tell_the_kinds_apart(kind: str, prediction_type: str, architecture: str, word: str) -> None:
    spec = modelspec(preset(kind, prediction_type), title="A model", date=DATE, resolution=640)
    assert spec["modelspec.sai_model_spec"] == "1.0.0"
    assert spec["modelspec.architecture"] == architecture
    assert spec["modelspec.prediction_type"] == word
    assert spec["modelspec.title"] == "A model"
    assert spec["modelspec.resolution"] == "640x640"
    assert spec["modelspec.date"] == "2026-11-23T03:00:00Z"
    assert spec["modelspec.implementation"]
    assert not {"modelspec.thumbnail", "modelspec.trigger_phrase", "emulsion.options"} & set(spec)
    assert all(isinstance(value, str) for value in spec.values())


def test_trigger_words_and_preview() -> None:
    files = preset("sd1", "epsilon")

    def thumbnail(preview: bytes) -> str | None:
        spec = modelspec(files, title="t", date=datetime.now(UTC), resolution=512, preview=preview)
        return spec.get("modelspec.thumbnail")

    assert thumbnail(JPEG) == "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
    assert thumbnail(b"<svg onload=evil()>") is None
    assert thumbnail(JPEG + b"x" * MAX_PREVIEW_BYTES) is None
    spec = modelspec(files, title="t", date=DATE, resolution=512, trigger_words=["mypetcat", "in my style"])
    assert spec["modelspec.trigger_phrase"] == "mypetcat, in my style"


def test_the_preview_is_the_newest_sample_small_and_without_its_prompt(tmp_path: Path) -> None:
    assert preview(tmp_path) is None
    for name, colour in (("gs99999-000-a", "red"), ("gs100000-000-a", "blue"), ("gs100000-001-b", "green")):
        picture = Image.new("RGB", (1024, 512), colour)
        picture.save(tmp_path / f"{name}.jpg", comment=b"a secret prompt")
    small = preview(tmp_path)
    assert small is not None
    assert b"secret" not in small
    with Image.open(io.BytesIO(small)) as found:
        assert (found.format, found.size) == ("JPEG", (256, 128))
        red, _, blue = np.asarray(found.convert("RGB"))[9, 9].tolist()
        assert blue > 200 > 50 > red
    (tmp_path / "gs100001-000-a.jpg").write_bytes(b"no picture")
    assert preview(tmp_path) is None


def test_options_go_in_without_paths_names_and_secrets() -> None:
    options = {
        "resolution": 512,
        "flip_p": 0.5,
        "shuffle_tags": True,
        "clip_grad_norm": None,
        "loss_type": "mse",
        "keep_tags": 2,
        "data_root": "/home/me/pictures",
        "logdir": "logs",
        "save_ckpt_dir": "models",
        "resume_ckpt": "secret-project",
        "optimizer_config": "optimizer.json",
        "sample_prompts": "prompts.txt",
        "hf_token": "hf_x",
        "wandb_api_key": "1234",
        "note": "see C:\\Users\\me",
        "home": "~me",
        "plugins": ["my.secret.Plugin"],
        "ema_resume_model": "x",
    }
    assert set(public_options(options)) == {
        *("resolution", "flip_p", "shuffle_tags", "clip_grad_norm", "loss_type", "keep_tags")
    }
    spec = modelspec(preset("sd1", "epsilon"), title="t", date=DATE, resolution=512, options=options)
    assert json.loads(spec["emulsion.options"])["flip_p"] == 0.5
    assert "me" not in json.loads(spec["emulsion.options"]).values()
