"""Whole runs with everything that watches switched on: the weights do not notice, and the run folder tells."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import World, final_state, make_world, run_folder, run_job, stop_after
from utils.gallery import jpeg_with_settings, strip
from utils.tree import same_tree

EMA = {"ema_decay_rate": 0.9, "ema_update_interval": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def validation_file(folder: Path, world: World, **changes: Any) -> Path:
    path = folder / "validation.json"
    values = {
        "val_split_mode": "none",
        "stabilize_training_loss": True,
        "stabilize_split_proportion": 0.5,
        "extra_manual_datasets": {"style": str(world.pictures)},
        "every_n_epochs": 0.5,
        "use_relative_loss": True,
    }
    path.write_text(json.dumps(values | changes), encoding="utf-8")
    return path


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["update"], row[tag]) for row in rows if tag in row]


@pytest.fixture(scope="module")
def watched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logdir = tmp_path_factory.mktemp("watched")
    pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        options: dict[str, Any] = {"sample_steps": 1, "log_step": 1, "wandb": True, "save_full_precision": True}
        options["validation_config"] = validation_file(logdir, world)
        both = {"ema_sample_nonema_model": True, "ema_sample_ema_model": True}
        assert run_job(world, logdir, **EMA, **both, **options) == 0
    return logdir


def test_everything_on_trains_the_same_weights(world: World, watched: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert run_job(world, tmp_path / "logs", **EMA, log_step=1000) == 0
    on, off = final_state(watched), final_state(tmp_path / "logs")
    for part in ("networks", "updater", "ema"):
        assert same_tree(on[part], off[part]), part


def test_curves_of_every_set_and_version(watched: Path) -> None:
    folder = run_folder(watched)
    for tag in ("loss/style", "loss/train-stabilized", "loss/style ema", "validation/style relative"):
        updates = [update for update, _ in scalars(folder, tag)]
        assert updates == [0, 1, 2, 3, 4, 5, 6], tag
    plain, average = scalars(folder, "loss/style"), scalars(folder, "loss/style ema")
    assert plain[0][1] == average[0][1], "before the first update they are the same model"
    assert plain[-1][1] < average[-1][1] < plain[0][1], "the average follows more slowly"
    assert scalars(folder, "validation/style relative")[0][1] == 1.0


def test_samples_and_tables(watched: Path) -> None:
    folder = run_folder(watched)
    names = sorted(path.name for path in (folder / "samples").glob("*.jpg"))
    assert names == sorted(f"gs{u:05}-000-{e}a-cat.jpg" for u in range(7) for e in ("", "ema-"))
    first, last = ((folder / "samples" / f"gs{update:05}-000-a-cat.jpg").read_bytes() for update in (0, 6))
    assert first != last
    rows = list(csv.DictReader((folder / "loss_by_image.csv").open(encoding="utf-8")))
    assert len(rows) == 7
    assert sum(int(row["visits"]) for row in rows) <= 21
    assert all(row["caption"] for row in rows)


def test_the_exported_folder_draws_the_same_picture_elsewhere(watched: Path) -> None:
    import numpy as np
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL import Image

    folder = run_folder(watched)
    (export,) = (folder / "ckpts").glob("last-*gs00006")
    pipeline = StableDiffusionPipeline.from_pretrained(str(export), safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a cat", 64, 64, num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(555)
    ).images[0]
    theirs = Image.open(io.BytesIO(jpeg_with_settings(strip([picture], (4.0,)), "")))

    def difference(update: int) -> float:
        ours = Image.open(folder / "samples" / f"gs{update:05}-000-a-cat.jpg")
        return float(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).mean())

    assert difference(6) < 0.5, "rounding"
    assert difference(0) > 3


def test_the_board_is_laid_out(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import metadata

    events = EventAccumulator(str(run_folder(watched)), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    texts = ("config", "optimizer", "validation", "data")
    assert {*(f"{text}/text_summary" for text in texts), "custom_scalars__config__"} <= set(tags["tensors"])
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert charts["validation"][:3] == ["style", "train-stabilized", "relative to the first"]
    assert charts["performance"] == ["images per second", "minutes per epoch"], "no memory is told on the CPU"
    start = metadata.parse_session_start_info_plugin_data(
        events.PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    )
    assert start.hparams["lr"].number_value == 1e-3
    assert start.hparams["lr text encoder"].number_value == 5e-4, "the optimizer file says it, no option does"
    assert start.hparams["optimizer"].string_value == "adamw"
    assert {"sample_000_a_cat", "sample_000_ema_a_cat", "first_update"} <= set(tags["images"])
    assert tags["histograms"] == ["timesteps"]
    assert {"loss/log_step", "loss/epoch", "hyperparameter/lr unet", "performance/images per second"} <= set(
        tags["scalars"]
    )


def test_a_run_that_ends_within_an_epoch_has_tables_of_all_it_trained(world: World, tmp_path: Path) -> None:
    assert run_job(world, tmp_path, max_steps=1, cond_dropout=0) == 0
    rows = list(csv.DictReader((run_folder(tmp_path) / "loss_by_image.csv").open(encoding="utf-8")))
    assert sum(int(row["visits"]) for row in rows) == 4


def test_a_resumed_run_has_the_same_curves(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation numbers, relative losses and the ledger's tables, as if the run had never stopped."""

    def outcome(logdir: Path) -> tuple[Any, ...]:
        folder = run_folder(logdir)
        tags = ("loss/val", "validation/val relative", "loss/log_step", "loss/epoch")
        return ([scalars(folder, tag) for tag in tags], (folder / "loss_by_image.csv").read_text(encoding="utf-8"))

    options: dict[str, Any] = {"log_step": 1}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    file = validation_file(tmp_path, world, val_split_mode="automatic", every_n_epochs=1, auto_split_proportion=0.3)
    options["validation_config"] = file
    assert run_job(world, tmp_path / "whole", **options) == 0
    stop_after(monkeypatch, 3)
    assert run_job(world, tmp_path / "stopped", **options) != 0
    stop_after(monkeypatch, None)
    assert run_job(world, tmp_path / "stopped", resume_ckpt="findlast", **options) == 0
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")
    minutes = {
        name: scalars(run_folder(tmp_path / name), "performance/minutes per epoch") for name in ("whole", "stopped")
    }
    assert {update for update, _ in minutes["whole"]} - {update for update, _ in minutes["stopped"]} == {4}, (
        "the epoch in which it stopped was not measured whole"
    )
