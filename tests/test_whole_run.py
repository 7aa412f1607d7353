"""One whole run on real photographs, as a user has it, and everything it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import training.loop
import training.rehearsal
from tests.jobs import World, arguments, final_state, run_folder, run_job, stop_after, watch
from training.session import Session
from utils.tree import same_tree

ROOT = Path(__file__).parent.parent
TAGS = {
    "hyperparameter/lr unet",
    "hyperparameter/lr text encoder",
    "loss/log_step",
    "loss/epoch",
    "loss/val",
    "optimizer/unet_grad_norm",
    "optimizer/te_grad_norm",
    "optimizer/unet_pre_clip_norm",
    "optimizer/te_pre_clip_norm",
    "performance/images per second",
    "performance/minutes per epoch",
}


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run with everything on."""
    folder = tmp_path_factory.mktemp("whole")
    validation = folder / "validation.json"
    validation.write_text(json.dumps({"auto_split_proportion": 0.2}), encoding="utf-8")
    code = run_job(
        world,
        folder / "logs",
        validation_config=validation,
        ema_decay_rate=0.9,
        ema_update_interval=1,
        no_save_ckpt=False,
        save_ckpt_dir=folder / "files",
        write_schedule=True,
        sample_steps=2,
        num_workers=2,
    )
    assert code == 0
    return folder


def test_the_run_folder_holds_what_it_should(done: Path) -> None:
    run = run_folder(done / "logs")
    names = {path.name for path in run.iterdir()}
    for name in (
        f"{run.name}.log",
        f"{run.name}_main.json",
        f"{run.name}_opt.json",
        "metrics.jsonl",
        "samples",
        "ckpts",
        "data_report.txt",
        "ep0_batch_schedule.txt",
        "ep2_batch_schedule.txt",
        "loss_by_image.csv",
        "loss_by_folder.csv",
    ):
        assert name in names, name
    samples = sorted(path.name for path in (run / "samples").glob("*.jpg"))
    assert samples[0].startswith("gs00000-000-")
    assert any(name.startswith("gs00002-000-ema") for name in samples)
    (last, average) = sorted(path.name for path in (run / "ckpts").iterdir() if path.is_dir())
    assert average == f"{last}_ema"
    assert {path.name for path in (done / "files").iterdir()} == {f"{last}.safetensors", f"{average}.safetensors"}


def test_the_single_file_shows_what_it_draws(done: Path) -> None:
    from safetensors import safe_open

    for path in (done / "files").iterdir():
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
        assert str(done) not in " ".join(metadata.values()), "no path of this machine"


def test_events_and_metrics_hold_the_tags(done: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_folder(done / "logs")
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= TAGS
    assert any(tag.startswith("sample_000") for tag in tags["images"])
    assert "config/text_summary" in tags["tensors"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {key for row in rows for key in row} >= TAGS
    validated = [row["update"] for row in rows if "loss/val" in row]
    assert validated[0] == 0, "a pass before the first update"
    assert len(validated) == 4, "and one after each epoch"


def test_the_checkpoint_is_a_pipeline_for_any_diffusers_program(done: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = run_folder(done / "logs")
    for folder in (run / "ckpts").iterdir():
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        assert pipeline.unet.dtype == torch.float32
        pipeline.set_progress_bar_config(disable=True)
        picture = pipeline("a cat", width=64, height=64, num_inference_steps=2, output_type="np").images[0]
        assert picture.shape == (64, 64, 3)


def test_the_resolved_options_start_the_same_run_again(done: Path, tmp_path: Path) -> None:
    import train

    run = run_folder(done / "logs")
    argv = ["--config", str(run / f"{run.name}_main.json"), "--logdir", str(tmp_path), "--no_save_ckpt"]
    assert train.main(argv) == 0
    again, first = final_state(tmp_path), final_state(done / "logs")
    assert same_tree(again["networks"], first["networks"])


def test_the_schedule_says_what_is_trained(done: Path) -> None:
    run = run_folder(done / "logs")
    lines = (run / "ep0_batch_schedule.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10, "12 pictures, two of which are held out"
    assert lines[0].startswith("update:00000, micro:0, wh:[")
    assert "caption:" in lines[0]


def test_a_dry_run_is_quick_and_loads_no_model(world: World, tmp_path: Path) -> None:
    import shutil

    pictures = tmp_path / "hundred"
    pictures.mkdir()
    photos = sorted(path for path in world.pictures.iterdir() if path.suffix != ".txt")
    for number in range(100):
        source = photos[number % len(photos)]
        shutil.copy(source, pictures / f"{number:03}{source.suffix}")
    argv = arguments(world, tmp_path / "logs", data_root=pictures, resume_ckpt="no/such-model")
    code = (
        "import time, sys; began = time.perf_counter(); import torch; after = time.perf_counter()\n"
        f"import train; code = train.main({[*argv, '--dry_run']!r}); print('SECONDS', time.perf_counter() - after)\n"
        "print('LOADED', [m for m in ('diffusers', 'transformers', 'accelerate') if m in sys.modules]); sys.exit(code)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "LOADED []" in shown.stdout
    assert "100 pictures" in shown.stdout
    assert "75 updates would be trained" in shown.stdout
    assert '"batch_size": 2' in shown.stdout
    assert not (tmp_path / "logs").exists()


def test_a_signal_stops_saves_and_says_so(world: World, tmp_path: Path) -> None:
    """SIGTERM to the program itself: the update in hand is finished, all is saved, the exit code is 143."""
    import signal

    argv = arguments(world, tmp_path / "logs", max_epochs=10_000, num_workers=1, log_step=1)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("update 3/"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(60) == 143
    assert "terminated:" in rest
    (saved,) = (run_folder(tmp_path / "logs") / "ckpts").iterdir()
    assert saved.name.startswith("interrupted-")


def test_a_shortage_of_memory_cuts_the_micro_batch_and_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"batch_size": 4, "grad_accum": 1, "max_steps": 1, "sample_prompts": "none"}
    assert run_job(world, tmp_path / "whole", **options) == 0
    whole = _first_moments(final_state(tmp_path / "whole"))
    original = training.loop.forward_backward

    def short(session: Session, batch: Any, images: int, *, last: bool) -> Any:
        result = original(session, batch, images, last=last)
        if len(batch.visits) > 1:
            raise torch.OutOfMemoryError("injected after the backward pass")
        return result

    monkeypatch.setattr(training.loop, "forward_backward", short)
    capsys.readouterr()
    assert run_job(world, tmp_path / "cut", **options) == 0
    assert "do not fit into memory" in capsys.readouterr().out
    cut = _first_moments(final_state(tmp_path / "cut"))
    assert (cut - whole).norm() / whole.norm() < 1e-5


def _first_moments(state: dict[str, Any]) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def look(tree: Any) -> None:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key == "exp_avg":
                found.append(value.flatten())
            elif isinstance(value, dict | list | tuple):
                look(value)

    look(state["updater"])
    return torch.cat(found)


def test_one_image_that_does_not_fit_ends_with_3_and_a_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training.loop.forward_backward

    def short(session: Session, *arguments: Any, **keywords: Any) -> Any:
        if session.progress.update == 2:
            raise torch.OutOfMemoryError("injected")
        return original(session, *arguments, **keywords)

    monkeypatch.setattr(training.loop, "forward_backward", short)
    assert run_job(world, tmp_path, sample_prompts="none") == 3
    assert "gradient_checkpointing" in capsys.readouterr().err
    (saved,) = (run_folder(tmp_path) / "ckpts").iterdir()
    assert "gs00002" in saved.name


def test_a_bad_loss_never_reaches_the_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import training.step

    original = training.step.diffusion_step
    weights: list[dict[str, torch.Tensor]] = []

    def poisoned(*arguments: Any) -> torch.Tensor:
        losses = original(*arguments)
        return losses * float("nan") if len(weights) == 2 else losses

    def look(session: Session) -> None:
        weights.append({name: value.clone() for name, value in session.models.unet.state_dict().items()})

    monkeypatch.setattr(training.step, "diffusion_step", poisoned)
    watch(monkeypatch, look)
    assert run_job(world, tmp_path, max_steps=4, log_step=1, sample_prompts="none") == 0
    shown = capsys.readouterr().out
    assert same_tree(weights[1], weights[2]), "update 3 was skipped"
    assert not same_tree(weights[2], weights[3]), "and update 4 was not"
    assert "update 3 was skipped" in shown
    assert ".jpg" in shown or ".png" in shown or ".webp" in shown


def test_bad_updates_in_a_row_end_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import training.step

    original = training.step.diffusion_step
    monkeypatch.setattr(training.step, "diffusion_step", lambda *arguments: original(*arguments) * float("inf"))
    code = run_job(world, tmp_path, log_step=1, max_bad_updates=2, sample_prompts="none", max_steps=9)
    assert code == 2
    assert "2 updates in a row" in capsys.readouterr().err
    (saved,) = (run_folder(tmp_path) / "ckpts").iterdir()
    assert saved.name.startswith("interrupted-"), "what was learned before is not lost"


def test_weights_beyond_half_precision_are_saved_in_full(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(world, tmp_path, lr=1e30, max_steps=2, sample_prompts="none") == 0
    assert "saved in fp32" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_later_is_replaced_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    import shutil

    pictures = shutil.copytree(world.pictures, tmp_path / "pictures")
    broken = sorted(pictures.glob("*.jpg"))[0]
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 3])
    options = {"data_root": pictures, "num_workers": workers, "sample_prompts": "none", "max_epochs": 2}
    assert run_job(world, tmp_path / "logs", **options) == 0
    shown = capsys.readouterr().out
    assert "another picture of its size is trained in its place" in shown
    assert broken.name in shown


def test_the_control_file_is_obeyed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(session: Session) -> None:
        if session.progress.update == 1:
            session.run.control.write_text("save sample stop\n", encoding="utf-8")

    watch(monkeypatch, write)
    assert run_job(world, tmp_path) == 130
    run = run_folder(tmp_path)
    names = sorted(path.name for path in (run / "ckpts").iterdir())
    assert any(name.startswith("job-ep00-gs00002") for name in names), names
    assert any(name.startswith("interrupted-") for name in names), names
    assert list((run / "samples").glob("gs00002-*.jpg"))
    assert not (run / "control").exists()


def test_settings_read_again_take_effect(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.json"
    config.write_text(json.dumps({"load_settings_every_epoch": True}), encoding="utf-8")
    seen: dict[int, tuple[Any, ...]] = {}

    def edit(session: Session) -> None:
        seen[session.progress.update] = (session.objective.weights.max().item(), session.options.data.cond_dropout)
        if session.progress.update == 1:
            changed = {
                "load_settings_every_epoch": True,
                "min_snr_gamma": 1.0,
                "cond_dropout": 0.5,
                "batch_size": 9,
                "save_every_n_epochs": 1,
            }
            config.write_text(json.dumps(changed), encoding="utf-8")
        if session.progress.update == 4:
            config.write_text("{", encoding="utf-8")

    watch(monkeypatch, edit)
    options = {"sample_prompts": "none", "batch_size": None, "config": config, "grad_accum": 3, "max_epochs": 4}
    assert run_job(world, tmp_path / "logs", **options) == 0
    shown = capsys.readouterr().out
    assert "min_snr_gamma: None -> 1.0" in shown
    assert "batch_size: 2 -> 9 takes effect with the next start" in shown
    assert "nothing has changed" in shown
    assert seen[2][1] == 0.04
    assert seen[3][1] == 0.5
    assert seen[8][1] == 0.5, "a broken file changes nothing"


def test_two_runs_do_not_share_a_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from utils.run_dir import RunDir

    stop_after(monkeypatch, 1)
    assert run_job(world, tmp_path) == 130
    stop_after(monkeypatch, None)
    monkeypatch.setattr("utils.run_dir._LOCK_PATIENCE_SECONDS", 0.1)
    with RunDir(run_folder(tmp_path)).lock():
        began = time.monotonic()
        assert run_job(world, tmp_path, resume_ckpt="findlast") == 75
        assert time.monotonic() - began < 60
    assert "another run" in capsys.readouterr().err


def test_the_rehearsal_before_the_first_update_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sample_prompts": "none", "max_epochs": 1}
    assert run_job(world, tmp_path / "plain", **options) == 0
    original = training.loop.before_first_update
    rehearsed = []

    def before(session: Session) -> None:
        training.rehearsal.rehearse(session)
        rehearsed.append(session.row_limits)
        original(session)

    monkeypatch.setattr(training.loop, "before_first_update", before)
    assert run_job(world, tmp_path / "rehearsed", **options) == 0
    assert rehearsed == [{}]
    assert same_tree(final_state(tmp_path / "rehearsed"), final_state(tmp_path / "plain"))


def test_a_rehearsal_that_runs_short_cuts_the_micro_batches_to_come(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.rehearsal.forward_backward
    limits: list[int] = []

    def short(session: Session, batch: Any, images: int, *, last: bool) -> Any:
        if len(batch.visits) > 1:
            raise torch.OutOfMemoryError("injected")
        return original(session, batch, images, last=last)

    def before(session: Session) -> None:
        training.rehearsal.rehearse(session)
        limits.extend(session.row_limits.values())

    monkeypatch.setattr(training.rehearsal, "forward_backward", short)
    monkeypatch.setattr(training.loop, "before_first_update", before)
    assert run_job(world, tmp_path, sample_prompts="none", max_epochs=1, batch_size=4) == 0
    assert limits == [1] * 3, "in every bucket"
