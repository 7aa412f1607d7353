"""Weights & Biases, offline: what goes to TensorBoard is in its files, too."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("wandb")

from utils.errors import UserError
from utils.mirror import open_mirror
from utils.tracking import METRICS, Tracker


def test_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    state = random.getstate(), torch.get_rng_state()
    tracker = Tracker(tmp_path, mirror=open_mirror("emulsion-test", None, tmp_path))
    tracker.hparams({"lr": 0.5, "shuffle_tags": True})
    tracker.scalars(25, {"loss/log_step": 0.125})
    tracker.scalars(20, {"loss/val": 0.25})
    tracker.text("config", "<b>text</b>")
    tracker.image("sample_000_cat", Image.new("RGB", (32, 32), "red"), 25)
    tracker.histogram("timesteps", [1, 2], [0, 1, 2], 25)
    tracker.close()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (binary,) = run.glob("*.wandb")
    names = (b"loss/log_step", b"0.125", b"loss/val", b"sample_000_cat", b"timesteps")
    until = time.monotonic() + 30
    # Its own process writes the file, a moment after `finish` has come back.
    while missing := [name for name in names if name not in binary.read_bytes()]:
        assert time.monotonic() < until, missing
        time.sleep(0.05)
    (page,) = run.glob("files/media/html/config*.html")
    assert "&lt;b&gt;text" in page.read_text(encoding="utf-8")
    (picture,) = run.glob("files/media/images/sample_000_cat*.jpg")
    assert Image.open(picture).size == (32, 32)
    assert "loss/val" in (tmp_path / METRICS).read_text(encoding="utf-8")


def test_nobody_logged_in_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="wandb login"):
        open_mirror("emulsion-test", None, tmp_path)
