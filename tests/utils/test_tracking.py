"""What TensorBoard and metrics.jsonl get to see, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import sinks
from utils.logs import close_logs, open_console
from utils.sinks import EventSink, Guard, MetricsSink, small_jpeg
from utils.tracking import METRICS, Tracker, charts, plain_words, sample_tag


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    open_console(stream)
    yield stream
    close_logs()


def board(folder: Path) -> Any:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def test_the_same_scalars_in_both(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.scalars(25, {"loss/log_step": torch.tensor(0.5), "hyperparameter/lr unet": 1e-6})
    tracker.scalars(50, {"loss/log_step": float("nan")})
    tracker.close()
    seen = board(tmp_path)
    first_point, second_point = seen.Scalars("loss/log_step")
    assert (first_point.step, first_point.value) == (25, 0.5)
    assert math.isnan(second_point.value)
    assert seen.Scalars("hyperparameter/lr unet")[0].value == pytest.approx(1e-6)
    first, second = rows(tmp_path)
    assert first["update"] == 25
    assert first["loss/log_step"] == 0.5
    assert second["loss/log_step"] is None, "JSON has no NaN"


def test_text_cannot_act(tmp_path: Path) -> None:
    text = "caption: <img src=http://x/y>\n```\n# not a heading"
    tracker = Tracker(tmp_path)
    tracker.text("config", text)
    from tensorboard.plugins.text.text_plugin import text_array_to_html

    (event,) = board(tmp_path).Tensors("config/text_summary")
    html = str(text_array_to_html(__import__("numpy").array(event.tensor_proto.string_val), enable_markdown=True))
    assert "<img" not in html
    assert "<h1" not in html
    assert "&lt;img src=http://x/y&gt;" in html


def test_pictures_are_small_and_their_originals_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randint(0, 256, (1024, 3072, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(noise.numpy())
    small, data = small_jpeg(picture)
    assert max(small.size) == sinks.PICTURE_SIDE
    assert len(data) < 10 * sinks.PICTURE_BYTES, "noise is the worst case"
    monkeypatch.setattr(sinks, "PICTURE_BUDGET", int(2.5 * len(data)))
    tracker = Tracker(tmp_path)
    for update in range(4):
        tracker.image("sample_000_noise", picture, update)
    Tracker(tmp_path, resume_update=3).image("sample_000_noise", picture, 4)
    images = board(tmp_path).Images("sample_000_noise")
    assert [image.step for image in images] == [0, 1], "the budget is spent, also for a run that goes on"
    assert Image.open(io.BytesIO(images[0].encoded_image_string)).size == small.size


def test_charts_histogram_and_hparams_can_be_read(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.layout(charts(["val"]))
    tracker.hparams({"lr": 1e-6, "lr_scheduler": "cosine", "flip_p": None, "shuffle_tags": True, "logdir": "logs"})
    tracker.histogram("timesteps", [5, 0, 2], [0, 10, 20, 30], 7)
    seen = board(tmp_path)
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import metadata

    layout = layout_pb2.Layout()
    layout.ParseFromString(seen.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["loss", "validation", "rates", "performance"]
    (event,) = seen.Histograms("timesteps")
    assert event.histogram_value.num == 7
    assert list(event.histogram_value.bucket) == [0, 5, 0, 2]
    contents = seen.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos if info.differs} == {"lr", "lr_scheduler", "shuffle_tags"}
    assert "flip_p" in {info.name for info in experiment.hparam_infos}, "a column for runs that give it"
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["lr"].number_value == 1e-6
    assert start.hparams["lr_scheduler"].string_value == "cosine"
    assert start.hparams["shuffle_tags"].string_value == "true"
    assert set(start.hparams) == {"lr", "lr_scheduler", "shuffle_tags"}


def test_charts_show_each_set_and_nothing_that_does_not_come() -> None:
    def shown(tag: str, **found: Any) -> list[str]:
        layout = charts(["val", "a (new) set", "val2"], **found)
        return [
            title for group in layout.values() for title, tags in group.items() if any(re.match(t, tag) for t in tags)
        ]

    for name in ("val", "a (new) set", "val2"):
        assert shown(f"loss/{name}") == shown(f"loss/{name} ema") == [name]
    assert shown("validation/val band 2 t250-499 ema") == ["val, band 2 of 4"]
    assert shown("validation/val relative", relative=True) == ["relative to the first"]
    assert shown("optimizer/unet_grad_norm") == ["gradient norm"]
    assert shown("optimizer/te_pre_clip_norm") == ["gradient norm before clipping"]
    assert shown("hyperparameter/lr text encoder") == ["learning rate"]
    assert shown("hyperparameter/grad scale", loss_scale=True) == ["loss scale"]
    assert shown("performance/vram", memory=True) == ["memory"]
    assert set(charts()) == {"loss", "rates", "performance"}
    assert set(charts()["performance"]) == {"images per second", "minutes per epoch"}
    assert set(charts(norms=False)["rates"]) == {"learning rate"}


@pytest.mark.parametrize("clock", [0.0, -3600.0])
def test_a_resumed_run_drops_what_came_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """Whatever the machine's clock did in between."""
    tracker = Tracker(tmp_path)
    for update in (10, 20, 30):
        tracker.scalars(update, {"loss/log_step": update})
    tracker.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"update": 15, "torn')
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)
    again = Tracker(tmp_path, resume_update=20)
    again.scalars(30, {"loss/log_step": -1.0})
    assert [row["update"] for row in rows(tmp_path)] == [10, 20, 30]
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss/log_step")] == [(10, 10), (20, 20), (30, -1)]


def test_a_sink_that_fails_warns_once_and_comes_back_with_what_it_missed(tmp_path: Path, console: io.StringIO) -> None:
    run = tmp_path / "run"
    run.write_text("a file where the folder should be")
    tracker = Tracker(run, retry_seconds=0.0)
    tracker.image("sample_000_x", Image.new("RGB", (8, 8)), 0)
    for update in (1, 2):
        tracker.scalars(update, {"loss": update})
    run.unlink()
    run.mkdir()
    tracker.scalars(3, {"loss": 3})
    tracker.close()
    assert [row["update"] for row in rows(run)] == [1, 2, 3]
    assert [e.step for e in board(run).Scalars("loss")] == [1, 2, 3]
    assert console.getvalue().count("cannot be written") == 2, "once for each of the two sinks"


def test_tries_become_rarer_and_a_success_ends_that(tmp_path: Path) -> None:
    tries: list[float] = []

    def opener() -> EventSink:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise OSError("no")
        return EventSink(tmp_path)

    guard = Guard("sink", opener, retry_seconds=0.02)
    while len(tries) < 4:
        guard.call("scalars", 1, {"loss": 1.0})
    waits = [after - before for before, after in pairwise(tries)]
    assert waits[0] >= 0.02
    assert waits[1] >= 0.04
    assert waits[2] >= 0.08
    assert guard._wait == 0.02


def test_after_a_failure_in_a_resumed_run_newer_rows_stay(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, resume_update=5, retry_seconds=0.0)
    tracker.scalars(6, {"loss": 1})
    metrics = tmp_path / METRICS
    kept = metrics.read_bytes()
    metrics.unlink()
    metrics.mkdir()
    tracker.scalars(7, {"loss": 1})
    metrics.rmdir()
    metrics.write_bytes(kept)
    tracker.scalars(8, {"loss": 1})
    assert [row["update"] for row in rows(tmp_path)] == [6, 7, 8]


def test_what_can_never_be_written_does_not_hold_up_the_rest(tmp_path: Path, console: io.StringIO) -> None:
    guard = Guard("events", lambda: EventSink(tmp_path), retry_seconds=0.0)
    guard.call("histogram", "t", ["no number"], [0.0, 1.0], 1)
    guard.call("scalars", 2, {"loss": 1.0})
    assert [e.step for e in board(tmp_path).Scalars("loss")] == [2]
    assert "ValueError" in console.getvalue() or "TypeError" in console.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_nothing(tmp_path: Path, console: io.StringIO) -> None:
    (tmp_path / METRICS).symlink_to("/dev/full")
    guard = Guard(METRICS, lambda: MetricsSink(tmp_path / METRICS), retry_seconds=0.0)
    guard.call("scalars", 1, {"loss": 1.0})
    assert "No space left" in console.getvalue()


def test_nobody_listens_on_other_processes(tmp_path: Path) -> None:
    tracker = Tracker(None)
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tags_of_prompts_hold_letters_and_digits_only() -> None:
    assert sample_tag(3, "a <b>Café</b>, 50 % off/../x") == "sample_003_a_b_Cafe_b_50_off_x"
    assert sample_tag(0, "日本") == "sample_000"
    assert len(sample_tag(0, "word " * 100)) <= 71
    assert plain_words("../..") == ""
