"""TensorBoard in a real browser shows what a run reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.board import available, board
from utils.tracking import Tracker, charts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not available(), reason="needs chromium and chromedriver")]


def test_every_page(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    tracker.layout(charts(["val", "a (new) set"]))
    tracker.text("config", "caption <img src=http://127.0.0.1:9/x.png> *stars*")
    others = {"clip_grad_norm": 1, "clip_skip": 0, "cond_dropout": 0, "flip_p": 0, "grad_accum": 1}
    tracker.hparams({"lr": 1e-6, "batch_size": 4, **others})
    for update in range(10, 60, 10):
        tracker.scalars(
            update,
            {"loss/log_step": 1 / update, "loss/val": 0.5, "loss/a (new) set": 0.4, "hyperparameter/lr unet": 1e-6},
        )
    tracker.image("sample_000_a_cat", Image.new("RGB", (96, 40), "orange"), 50)
    tracker.histogram("timesteps", [1, 2, 3], [0, 10, 20, 30], 50)
    tracker.close()
    with board(tmp_path) as (browser, address):
        browser.open(address + "#timeseries")
        text = browser.wait_for("/lr unet")
        assert "/log_step" in text
        browser.open(address + "#custom_scalars")
        text = browser.wait_for("a (new) set")
        assert all(name in text for name in ("training", "learning rate", "images per second"))
        browser.open(address + "#text")
        assert "<img src=http://127.0.0.1:9/x.png> *stars*" in browser.wait_for("caption")
        browser.open(address + "#images")
        browser.wait_for("sample_000_a_cat")
        browser.wait_for_picture(96, 40)
        browser.open(address + "#hparams")
        browser.wait_for("0.0000010000")  # the rate, in one of the five columns that the table opens with
