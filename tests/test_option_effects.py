"""Every option does what it is for: a row each, which fails when the option is ignored."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.option_lab import Lab, WandbDouble, same
from utils.config import SECTIONS, Options
from utils.schema import option_fields

Row = Callable[[Lab], None]
ROWS: dict[str, Row] = {}
# Accepted and without effect. An option must not stay here: it is wired up and gets its row, or it goes.
NOT_YET: set[str] = set()


def row(option: str) -> Callable[[Row], Row]:
    """Make the function the test of `option`."""

    def add(check: Row) -> Row:
        assert option not in ROWS
        ROWS[option] = check
        return check

    return add


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def _settings_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run may set these for its process; the next test must not inherit them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_every_option_has_a_row() -> None:
    options = {name for section in SECTIONS.values() for name in option_fields(section)}
    assert set(ROWS) | NOT_YET == options
    assert not set(ROWS) & NOT_YET


# --- run


@row("config")
def a_file_gives_the_options(lab: Lab) -> None:
    for steps in (1, 2):
        path, logdir = lab.config(max_steps=steps, dry_run=True)
        assert f"dry run: {steps} updates" in lab.start(["--config", path], logdir).told


@row("project_name")
def the_project_names_folders_and_checkpoints(lab: Lab) -> None:
    other = lab.run(project_name="another one")
    assert other.folder.name.startswith("another one-")
    assert other.last.name == "last-another one-ep00-gs00002"
    assert lab.run().last.name == "last-lab-ep00-gs00002"


@row("logdir")
def run_folders_lie_in_logdir(lab: Lab) -> None:
    outcome = lab.run(logdir=str(lab.folder / "elsewhere"))
    assert outcome.folder.parent == lab.folder / "elsewhere"


@row("seed")
def the_seed_decides_the_draws(lab: Lab) -> None:
    other = lab.run(seed=556)
    assert other.resolved["seed"] == 556
    assert not same(other.weights("unet"), lab.run().weights("unet"))
    told = {lab.run(seed=-1, dry_run=True, max_epochs=n).told.split("seed ")[1].split("\n")[0] for n in (1, 2)}
    assert len(told) == 2, "two random seeds"
    assert all(int(seed) >= 0 for seed in told)


@row("max_epochs")
def epochs_end_the_run(lab: Lab) -> None:
    assert "dry run: 6 updates" in lab.run(max_epochs=2, max_steps=None, dry_run=True).told
    assert lab.run(max_epochs=1, max_steps=None).last.name.endswith("ep01-gs00003")


@row("max_steps")
def steps_end_the_run(lab: Lab) -> None:
    assert lab.run(max_steps=1).last.name.endswith("gs00001")
    assert lab.run().last.name.endswith("gs00002")


@row("dry_run")
def a_dry_run_writes_nothing(lab: Lab) -> None:
    outcome = lab.run(dry_run=True)
    assert outcome.code == 0
    assert not outcome.logdir.exists()


@row("run_name")
def the_run_has_this_name_at_weights_and_biases(lab: Lab) -> None:
    with weights_and_biases() as wandb:
        outcome = lab.run(wandb=True, run_name="a name", max_steps=1)
        assert wandb.names == ["a name"]
    with weights_and_biases() as wandb:
        outcome = lab.run(wandb=True, max_steps=1)
        assert wandb.names == [outcome.folder.name]


@row("load_settings_every_epoch")
def the_file_is_read_again(lab: Lab) -> None:
    from training.loop import train

    for on, expected in ((True, 0.5), (False, 0.0)):
        changes = {"load_settings_every_epoch": on, "cond_dropout": 0.0, "batch_size": 6, "max_steps": 2}
        with lab.session(**changes) as session:
            path = Path(session.options.run.config)
            path.write_text(json.dumps({**json.loads(path.read_text()), "cond_dropout": 0.5}))
            train(session)
            assert session.progress.epoch == 2
            assert session.options.data.cond_dropout == expected


# --- model


@row("resume_ckpt")
def the_run_starts_from_this_model(lab: Lab) -> None:
    from starter.make_model import random_model

    other = lab.run(resume_ckpt=str(random_model(lab.folder / "other model", seed=1)), lr=0.0)
    assert not same(other.weights("vae"), lab.run().weights("vae"))


def vae_of(lab: Lab, **changes: Any) -> dict[str, torch.Tensor]:
    """The VAE that a run has: nobody trains it."""
    outcome = lab.run(max_steps=1, **changes)
    assert outcome.code == 0, outcome.told
    return outcome.weights("vae")


@row("hub_revision")
def the_run_starts_from_this_revision(lab: Lab) -> None:
    import huggingface_hub.constants

    from starter.make_model import random_model

    home = lab.folder / "hub"
    repository = home / "models--lab--model"
    for number, name in enumerate(("main", "other")):
        commit = f"{number + 1:040}"
        random_model(repository / "snapshots" / commit, seed=number)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
        main = vae_of(lab, resume_ckpt="lab/model")
        other = vae_of(lab, resume_ckpt="lab/model", hub_revision="other")
    assert same(main, dict(lab.models.vae.state_dict()))
    assert not same(other, main)


@row("hub_variant")
def the_run_starts_from_this_variant(lab: Lab) -> None:
    from starter.make_model import random_model

    folder, other = lab.folder / "two variants", random_model(lab.folder / "variant", seed=1)
    shutil.copytree(lab.model, folder)
    for path in other.glob("*/*.safetensors"):
        shutil.copy(path, folder / path.parent.name / f"{path.stem}.fp16.safetensors")
    plain, variant = (vae_of(lab, resume_ckpt=str(folder), hub_variant=name) for name in (None, "fp16"))
    assert same(plain, dict(lab.models.vae.state_dict()))
    assert same(variant, vae_of(lab, resume_ckpt=str(other)))
    # A checkpoint of ours has no variants: a chain that began with one goes on all the same.
    begun = lab.run(max_steps=1, resume_ckpt=str(folder), hub_variant="fp16").last
    vae_of(lab, resume_ckpt=str(begun), hub_variant="fp16")


def single_file(lab: Lab) -> Path:
    """A single file of the tiny model, with an average of the UNet that is half of it."""
    from safetensors.torch import load_file, save_file

    path = lab.folder / "single" / "both.safetensors"
    if not path.exists():
        lab.run(no_save_ckpt=False, save_ckpt_dir=str(path.parent), save_full_precision=True, lr=0.0)
        tensors = load_file(next(path.parent.glob("*.safetensors")))
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            average = f"model_ema.{name.removeprefix('model.').replace('.', '')}"
            tensors[average] = tensors[name] / 2
        save_file(tensors, path)
    return path


@row("model_config")
def a_single_file_is_described_by_it(lab: Lab) -> None:
    source = str(single_file(lab))
    assert lab.run(resume_ckpt=source, max_steps=1).code == 2, "no preset is so small"
    assert same(vae_of(lab, resume_ckpt=source, model_config=str(lab.model)), dict(lab.models.vae.state_dict()))


@row("model_ema")
def the_average_in_a_single_file_is_taken(lab: Lab) -> None:
    source = {"resume_ckpt": str(single_file(lab)), "model_config": str(lab.model), "max_steps": 1, "lr": 0.0}
    plain = lab.run(**source).weights("unet")
    average = lab.run(model_ema=True, **source).weights("unet")
    assert all(torch.equal(average[name], plain[name] / 2) for name in plain)


@row("prediction_type")
def the_model_answers_with_this(lab: Lab) -> None:
    assert first_loss(lab, prediction_type="v_prediction") != first_loss(lab)
    assert first_loss(lab, prediction_type="epsilon") == first_loss(lab)
    saved = lab.run(max_steps=1, prediction_type="v_prediction").last / "scheduler/scheduler_config.json"
    assert json.loads(saved.read_text())["prediction_type"] == "v_prediction"


@row("resume_mode")
def an_unfinished_run_goes_on_or_gives_its_weights(lab: Lab) -> None:
    unfinished = lab.run(ckpt_every_n_minutes=0)
    saved = str(unfinished.folder / "ckpts" / "lab-ep00-gs00001")
    weights = lab.run(resume_ckpt=saved, resume_mode="weights", max_steps=1)
    assert weights.folder != unfinished.folder
    assert weights.ckpts == ["last-lab-ep00-gs00001"]
    assert lab.run(resume_mode="exact").code == 2, "a model folder cannot go on"
    exact = lab.run(resume_ckpt=saved, resume_mode="auto", max_steps=3)
    assert "update 1/3" not in exact.told
    assert "last-lab-ep01-gs00003" in unfinished.ckpts


@row("disable_unet_training")
def the_unet_stays_as_it_is(lab: Lab) -> None:
    outcome = lab.run(disable_unet_training=True)
    assert same(outcome.weights("unet"), dict(lab.models.unet.state_dict()))
    assert not same(outcome.weights("text_encoder"), dict(lab.models.text_encoder.state_dict()))
    assert set(outcome.state["updater"]["parts"]) == {"text_encoder"}


@row("disable_textenc_training")
def the_text_encoder_stays_as_it_is(lab: Lab) -> None:
    outcome = lab.run(disable_textenc_training=True)
    assert same(outcome.weights("text_encoder"), dict(lab.models.text_encoder.state_dict()))
    assert not same(outcome.weights("unet"), dict(lab.models.unet.state_dict()))
    assert set(outcome.state["updater"]["parts"]) == {"unet"}


@row("clip_skip")
def the_last_layer_is_skipped(lab: Lab) -> None:
    before, skipped, whole = (
        dict(lab.models.text_encoder.state_dict()),
        lab.run(clip_skip=2).weights("text_encoder"),
        lab.run().weights("text_encoder"),
    )
    last = [name for name in before if ".layers.2." in name]
    assert last
    assert all(torch.equal(skipped[name], before[name]) for name in last)
    assert not all(torch.equal(whole[name], before[name]) for name in last)


@row("attn_type")
def attention_is_computed_in_slices(lab: Lab) -> None:
    for kind, expected in (("sdp", "AttnProcessor2_0"), ("slice", "SlicedAttnProcessor")):
        with lab.session(attn_type=kind) as session:
            processors = {type(p).__name__ for p in session.models.unet.attn_processors.values()}
        assert processors == {expected}


@row("gradient_checkpointing")
def activations_are_computed_twice(lab: Lab) -> None:
    from training.loop import train_update

    calls: list[str] = []
    with lab.session(gradient_checkpointing=True, batch_size=1) as session:
        for name in ("unet", "text_encoder"):
            modules = dict(getattr(session.models, name).named_modules())
            inside = next(module for place, module in modules.items() if place.endswith(INSIDE[name]))
            inside.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        updates = session.data.plan(0)
        train_update(session, updates[0], session.batches.epoch(updates))
    assert sorted(calls) == ["text_encoder", "text_encoder", "unet", "unet"]
    same_run = lab.run(gradient_checkpointing=True).weights("unet")
    assert same(same_run, lab.run().weights("unet")), "memory only"


# Parts of a block that checkpointing computes anew.
INSIDE = {"unet": "down_blocks.0.resnets.0", "text_encoder": "layers.0.mlp"}


# --- data


@row("data_root")
def pictures_come_from_here(lab: Lab) -> None:
    other = lab.folder / "one picture"
    other.mkdir()
    (other / "a dog.webp").write_bytes(next(lab.photos.glob("cat*.webp")).read_bytes())
    assert "1 picture, 1 to train on" in lab.run(data_root=str(other), dry_run=True).told
    assert "7 pictures, 7 to train on" in lab.run(data_root=[str(other), str(lab.photos)], dry_run=True).told


@row("resolution")
def pictures_have_this_area(lab: Lab) -> None:
    for side in (64, 96):
        areas = [batch.pixels.shape[2] * batch.pixels.shape[3] for batch in lab.batches(resolution=side)]
        assert max(areas) == side * side


@row("bucket_step")
def sides_are_multiples_of_it(lab: Lab) -> None:
    def sides(step: int) -> set[int]:
        return {side for batch in lab.batches(bucket_step=step) for side in batch.pixels.shape[2:]}

    assert sides(16) == {48, 64, 80}
    assert sides(64) == {64}


@row("buckets")
def buckets_fit_the_pictures(lab: Lab) -> None:
    folder = lab.folder / "wide"
    folder.mkdir()
    Image.new("RGB", (184, 100)).save(folder / "nothing.png")

    def size(kind: str) -> tuple[int, ...]:
        (batch,) = lab.batches(data_root=str(folder), buckets=kind, resolution=128)
        return tuple(batch.pixels.shape[2:])

    assert size("computed") == (80, 160)
    assert size("fitted") == (96, 160)


@row("rated_dataset")
def later_epochs_use_fewer_pictures(lab: Lab) -> None:
    epochs: dict[str, Any] = {"max_epochs": 3, "max_steps": None, "dry_run": True}
    assert "dry run: 9 updates" in lab.run(**epochs).told
    assert "dry run: 7 updates" in lab.run(rated_dataset=True, **epochs).told


@row("rated_dataset_target_dropout_percent")
def so_many_pictures_are_left_out(lab: Lab) -> None:
    epochs: dict[str, Any] = {"max_epochs": 3, "max_steps": None, "dry_run": True, "rated_dataset": True}
    assert "dry run: 6 updates" in lab.run(rated_dataset_target_dropout_percent=100, **epochs).told


@row("background")
def transparent_pictures_show_it(lab: Lab) -> None:
    folder = lab.folder / "clear"
    folder.mkdir()
    Image.new("RGBA", (80, 80), (10, 20, 30, 0)).save(folder / "nothing.png")
    for name, value in (("white", 255), ("black", 0), ("grey", 128)):
        (batch,) = lab.batches(data_root=str(folder), background=name)
        assert (batch.pixels.int() - value).abs().max() <= 1


@row("write_schedule")
def every_visit_is_written_down(lab: Lab) -> None:
    (path,) = lab.run(write_schedule=True).folder.glob("*_batch_schedule.txt")
    assert path.name == "ep0_batch_schedule.txt"
    assert len(path.read_text().splitlines()) == 6
    assert not list(lab.run().folder.glob("*_batch_schedule.txt"))


@row("check_data")
def every_picture_is_decoded_before(lab: Lab) -> None:
    folder = lab.folder / "torn"
    shutil.copytree(lab.photos, folder)
    path = next(folder.glob("*.jpg"))
    path.write_bytes(path.read_bytes()[:-2000])
    assert "6 to train on" in lab.run(data_root=str(folder), dry_run=True).told
    assert "5 to train on" in lab.run(data_root=str(folder), dry_run=True, check_data=True).told


@row("data_index")
def what_was_read_is_kept_there(lab: Lab) -> None:
    cache = lab.folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))

        def kept(kind: str) -> tuple[bool, bool]:
            lab.run(data_index=kind, dry_run=True, seed=7)
            return any(lab.folder.glob(".photos.*.json")), any(cache.rglob("*.json"))

        assert [kept(kind) for kind in ("off", "beside", "cache")] == [(False, False), (True, False), (True, True)]


@row("batch_size")
def a_forward_pass_takes_so_many(lab: Lab) -> None:
    assert max(len(batch.visits) for batch in lab.batches(batch_size=1)) == 1
    assert lab.run(batch_size=1).images == 2
    assert lab.run().images == 4


@row("grad_accum")
def an_update_takes_as_many_times_more(lab: Lab) -> None:
    twice = lab.run(grad_accum=2)
    assert twice.images > lab.run().images
    assert "2 updates, micro-batches of up to 2" in twice.told


@row("cond_dropout")
def captions_are_dropped(lab: Lab) -> None:
    assert {caption for batch in lab.batches(cond_dropout=1) for caption in batch.captions} == {""}
    assert "" not in {caption for batch in lab.batches(cond_dropout=0) for caption in batch.captions}
    one, other = lab.run(cond_dropout=0), lab.run(cond_dropout=1)
    assert not same(one.weights("text_encoder"), other.weights("text_encoder"))


@row("flip_p")
def pictures_are_flipped(lab: Lab) -> None:
    plain = lab.batches(flip_p=0, crop_jitter=0)
    flipped = lab.batches(flip_p=1, crop_jitter=0)
    for one, other in zip(plain, flipped, strict=True):
        assert torch.equal(one.pixels.flip(-1), other.pixels)
        assert not torch.equal(one.pixels, other.pixels)


@row("crop_jitter")
def sides_are_cut_at_random(lab: Lab) -> None:
    still, moved = lab.batches(crop_jitter=0), lab.batches(crop_jitter=0.3)
    assert not any(torch.equal(a.pixels, b.pixels) for a, b in zip(still, moved, strict=True))


def tags_of(lab: Lab, **changes: Any) -> list[list[str]]:
    """The parts of the captions of a long main prompt's tags, one list a visit."""
    folder = lab.folder / "tagged"
    if not folder.exists():
        folder.mkdir()
        for path in lab.photos.glob("*.webp"):
            (folder / path.name).write_bytes(path.read_bytes())
            (folder / path.name).with_suffix(".txt").write_text("thing, " + ", ".join("abcdefgh"))
    batches = lab.batches(data_root=str(folder), cond_dropout=0, **changes)
    return [caption.split(", ") for batch in batches for caption in batch.captions]


@row("shuffle_tags")
def tags_stand_in_another_order(lab: Lab) -> None:
    written = ["thing", *"abcdefgh"]
    assert all(tags == written for tags in tags_of(lab))
    shuffled = tags_of(lab, shuffle_tags=True)
    assert all(tags != written and sorted(tags) == sorted(written) and tags[0] == "thing" for tags in shuffled)
    assert shuffled[0] != shuffled[1], "an order of its own for every visit"


@row("keep_tags")
def first_tags_stay(lab: Lab) -> None:
    kept = tags_of(lab, shuffle_tags=True, keep_tags=6)
    assert all(tags[:7] == ["thing", *"abcdef"] for tags in kept)
    assert any(tags[:7] != ["thing", *"abcdef"] for tags in tags_of(lab, shuffle_tags=True))


@row("num_workers")
def pictures_are_read_in_other_processes(lab: Lab) -> None:
    assert [len(lab.workers(num_workers=count)) for count in (0, 1, 2)] == [0, 1, 2]


@row("worker_start")
def workers_begin_afresh(lab: Lab) -> None:
    assert lab.workers(num_workers=1, worker_start="spawn") == ["SpawnProcess"]
    if os.name == "posix":
        assert lab.workers(num_workers=1, worker_start="fork") == ["ForkProcess"]


# --- noise


def changed_draws(lab: Lab, **changes: Any) -> set[str]:
    """The draws that are others, or there at all, because of `changes`."""
    quiet = {"zero_frequency_noise_ratio": 0.0}
    one, other = lab.draws(**quiet), lab.draws(**quiet | changes)
    return {name for name in other if name not in one or not torch.equal(one[name], other[name])}


@row("zero_frequency_noise_ratio")
def noise_has_an_offset(lab: Lab) -> None:
    assert changed_draws(lab, zero_frequency_noise_ratio=0.3) == {"noise"}
    assert not same(lab.run(zero_frequency_noise_ratio=0.3).weights("unet"), lab.run().weights("unet"))
    assert terminal_signal(lab, zero_frequency_noise_ratio=-1) == 0


@row("pyramid_noise_discount")
def noise_has_levels(lab: Lab) -> None:
    assert changed_draws(lab, pyramid_noise_discount=0.8) == {"noise"}


def terminal_signal(lab: Lab, **changes: Any) -> float:
    from training.parts import build_run_objective

    return build_run_objective(lab.models, lab.options(**changes), lab.device()).signal[-1].item()


@row("enable_zero_terminal_snr")
def the_last_timestep_is_pure_noise(lab: Lab) -> None:
    assert terminal_signal(lab) > 0.05
    assert terminal_signal(lab, enable_zero_terminal_snr=True) == 0
    on = lab.run(enable_zero_terminal_snr=True)
    assert not same(on.weights("unet"), lab.run().weights("unet"))
    files = [json.loads((each.last / "scheduler/scheduler_config.json").read_text()) for each in (on, lab.run())]
    assert files[0] != files[1], "exports are marked"
    assert ["a model that predicts the noise" in each.told for each in (on, lab.run())] == [True, False]


@row("timestep_start")
def early_timesteps_are_left_out(lab: Lab) -> None:
    assert lab.draws(timestep_start=990)["timesteps"].min() >= 990
    assert lab.draws()["timesteps"].min() < 990


@row("timestep_end")
def late_timesteps_are_left_out(lab: Lab) -> None:
    assert lab.draws(timestep_end=10)["timesteps"].max() < 10
    assert lab.draws()["timesteps"].max() >= 10


@row("timestep_sampling")
def timesteps_are_spread(lab: Lab) -> None:
    for sampling in ("stratified", "logit_normal"):
        assert changed_draws(lab, timestep_sampling=sampling) == {"timesteps"}
    for batch in lab.batches(timestep_sampling="stratified", batch_size=2, data_root=str(lab.photos)):
        if len(batch.visits) == 2:
            assert sorted(batch.draws.timesteps // 500) == [0, 1], "a stratum each"


@row("embedding_perturbation")
def text_embeddings_are_disturbed(lab: Lab) -> None:
    assert changed_draws(lab, embedding_perturbation=1.0) == {"embedding_noise"}
    assert not same(lab.run(embedding_perturbation=1.0).weights("unet"), lab.run().weights("unet"))


@row("input_perturbation")
def inputs_are_disturbed(lab: Lab) -> None:
    assert changed_draws(lab, input_perturbation=0.5) == {"input_noise"}
    assert not same(lab.run(input_perturbation=0.5).weights("unet"), lab.run().weights("unet"))


# --- loss


def first_loss(lab: Lab, **changes: Any) -> float:
    """The loss of the first update: the weights are the model's own yet."""
    return lab.run(max_steps=1, **changes).scalars("loss/log_step")[0]


@row("loss_type")
def losses_are_judged_otherwise(lab: Lab) -> None:
    values = {kind: first_loss(lab, loss_type=kind) for kind in ("mse", "huber", "mse_huber", "huber_mse")}
    assert len(set(values.values())) == 4, values
    assert values["mse_huber"] + values["huber_mse"] == pytest.approx(values["mse"] + values["huber"], rel=1e-5)


@row("min_snr_gamma")
def easy_timesteps_count_less(lab: Lab) -> None:
    assert first_loss(lab, min_snr_gamma=0.01) < 0.9 * first_loss(lab)


@row("loss_weighting")
def timesteps_are_weighed(lab: Lab) -> None:
    values = {kind: first_loss(lab, loss_weighting=kind) for kind in ("none", "soft_min_snr", "debiased")}
    assert len(set(values.values())) == 3, values


# --- optimizer

UNET_RATE, TEXT_RATE = "hyperparameter/lr unet", "hyperparameter/lr text encoder"


@row("optimizer_config")
def the_file_sets_optimizers_and_rates(lab: Lab) -> None:
    file = lab.write("lion.json", {"base": {"optimizer": "lion", "lr": 5e-5}})
    outcome = lab.run(optimizer_config=file)
    assert outcome.scalars(UNET_RATE) == [5e-5] * 2
    assert not same(outcome.weights("unet"), lab.run(lr=5e-5).weights("unet")), "another optimizer, same rate"


@row("lr")
def the_rate_of_the_flag_counts(lab: Lab) -> None:
    assert lab.run().scalars(UNET_RATE) == [1e-3] * 2
    outcome = lab.run(lr=1e-4)
    assert outcome.scalars(UNET_RATE) == [1e-4] * 2
    assert outcome.scalars(TEXT_RATE) == pytest.approx([5e-5] * 2)
    start = dict(lab.models.unet.state_dict())
    moved = [
        max((tensor - start[name]).abs().max().item() for name, tensor in each.weights("unet").items())
        for each in (outcome, lab.run())
    ]
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.2), "Adam's steps are as long as its rate"


@row("lr_scheduler")
def rates_follow_the_shape(lab: Lab) -> None:
    rates = lab.run(lr_scheduler="linear", lr_decay_steps=2, lr_warmup_steps=0).scalars(UNET_RATE)
    assert rates == pytest.approx([1e-3, 5e-4])


@row("lr_decay_steps")
def the_decay_takes_so_long(lab: Lab) -> None:
    rates = lab.run(lr_scheduler="linear", lr_decay_steps=4, lr_warmup_steps=0).scalars(UNET_RATE)
    assert rates == pytest.approx([1e-3, 7.5e-4])


@row("lr_warmup_steps")
def the_warmup_takes_so_long(lab: Lab) -> None:
    shape = {"lr_scheduler": "cosine", "lr_decay_steps": 10}
    warm, cold = (lab.run(lr_warmup_steps=n, **shape).scalars(UNET_RATE) for n in (4, 0))
    assert warm[1] > warm[0]
    assert cold[1] < cold[0]


@row("weight_dtype")
def weights_are_kept_in_it(lab: Lab) -> None:
    for dtype, kept in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert {tensor.dtype for tensor in lab.run(weight_dtype=dtype).weights("unet").values()} == {kept}


@row("step_in_backward")
def gradients_never_all_exist(lab: Lab) -> None:
    from optimizer.in_backward import UpdaterInBackward

    with lab.session(step_in_backward=True) as session:
        assert isinstance(session.updater, UpdaterInBackward)
    with lab.session() as session:
        assert not isinstance(session.updater, UpdaterInBackward)
    inside, after = (lab.run(step_in_backward=on).weights("unet") for on in (True, False))
    assert all(torch.allclose(inside[name], after[name], atol=1e-5) for name in after)
    assert lab.run(step_in_backward=True, clip_grad_norm=1.0).code == 2


@row("max_bad_updates")
def a_run_of_bad_updates_ends(lab: Lab) -> None:
    """The first update of such a rate makes weights with which every loss overflows."""
    spoilt = {"lr": 1e30, "max_steps": 5, "save_full_precision": True}
    assert lab.run(**spoilt, max_bad_updates=20).code == 0
    ended = lab.run(**spoilt, max_bad_updates=2)
    assert ended.code == 2
    assert "max_bad_updates = 2" in ended.told
    assert [row["update"] for row in ended.metrics if "loss/log_step" in row][-1] == 3


@row("scale_lr")
def rates_grow_with_the_update(lab: Lab) -> None:
    factor = 2**0.55
    assert lab.run(scale_lr=True).scalars(UNET_RATE) == pytest.approx([1e-3 * factor] * 2)
    assert lab.run(scale_lr=True).scalars(TEXT_RATE) == pytest.approx([5e-4 * factor] * 2)


@row("clip_grad_norm")
def gradients_are_clipped(lab: Lab) -> None:
    clipped = lab.run(clip_grad_norm=1e-3)
    for short in ("unet", "te"):
        assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in clipped.scalars(f"optimizer/{short}_grad_norm"))
        assert min(lab.run().scalars(f"optimizer/{short}_grad_norm")) > 1e-3
        assert clipped.scalars(f"optimizer/{short}_pre_clip_norm")[0] == pytest.approx(
            lab.run().scalars(f"optimizer/{short}_pre_clip_norm")[0]
        )


# --- EMA


def averaged(lab: Lab, **changes: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = lab.run(**changes).state["ema"]["unet"]
    return tensors


@row("ema_decay_rate")
def an_average_is_kept(lab: Lab) -> None:
    assert lab.run().state["ema"] is None
    average = averaged(lab, ema_decay_rate=0.25, ema_update_interval=2)
    start, end = lab.models.unet.state_dict(), lab.run().weights("unet")
    for name, tensor in average.items():
        assert torch.allclose(tensor, 0.25 * start[name] + 0.75 * end[name], atol=1e-6)
    assert "last-lab-ep00-gs00002_ema" in lab.run(ema_decay_rate=0.25, ema_update_interval=2).ckpts
    assert same(lab.run(ema_decay_rate=0.25, ema_update_interval=2).weights("unet"), end), "only watches"


@row("ema_strength_target")
def the_target_sets_the_rate(lab: Lab) -> None:
    outcome = lab.run(ema_strength_target=0.09, ema_update_interval=1)
    assert "EMA: rate 0.3 every 1 updates" in outcome.told
    assert outcome.state["ema"] is not None


@row("ema_update_interval")
def the_average_moves_so_often(lab: Lab) -> None:
    each = averaged(lab, ema_decay_rate=0.5, ema_update_interval=1)
    second = averaged(lab, ema_decay_rate=0.5, ema_update_interval=2)
    never = averaged(lab, ema_decay_rate=0.5, ema_update_interval=3)
    assert not same(each, second)
    assert all(torch.equal(never[name], tensor) for name, tensor in lab.models.unet.state_dict().items())


@row("ema_device")
def the_average_lives_there(lab: Lab) -> None:
    """Where there is no GPU, asking for one must not be passed over; tests/gpu looks at the rest."""
    outcome = lab.run(ema_decay_rate=0.5, ema_device="cuda", max_steps=1)
    assert outcome.code == 2
    assert "ema_device = cuda" in outcome.told
    assert lab.run(ema_decay_rate=0.5, ema_device="cpu", max_steps=1).code == 0


@row("ema_resume_model")
def the_average_starts_from_it(lab: Lab) -> None:
    from starter.make_model import random_model
    from utils.models import load_models

    source = random_model(lab.folder / "average", seed=2)
    start = load_models(source).unet.state_dict()
    average = averaged(lab, ema_decay_rate=0.5, ema_update_interval=3, ema_resume_model=str(source))
    assert all(torch.equal(average[name], start[name]) for name in average)


def one_sample(lab: Lab, **more: Any) -> str:
    content = {"cfgs": [1.0], "num_inference_steps": 1, "samples": [{"prompt": "a cat"}], **more}
    return lab.write("one_sample.json" if not more else "pretrain.json", content)


def sample_versions(lab: Lab, **changes: Any) -> set[str]:
    names = lab.run(
        max_steps=1,
        sample_steps=1,
        sample_prompts=one_sample(lab),
        ema_decay_rate=0.5,
        ema_update_interval=1,
        **changes,
    ).samples
    return {"ema" if "-ema-" in name else "plain" for name in names if name.startswith("gs00001")}


@row("ema_sample_nonema_model")
def plain_weights_are_sampled(lab: Lab) -> None:
    assert sample_versions(lab) == {"ema"}
    assert sample_versions(lab, ema_sample_nonema_model=True) == {"plain"}


@row("ema_sample_ema_model")
def the_average_is_sampled_as_well(lab: Lab) -> None:
    assert sample_versions(lab, ema_sample_nonema_model=True, ema_sample_ema_model=True) == {"plain", "ema"}


# --- samples


@row("sample_prompts")
def these_prompts_are_drawn(lab: Lab) -> None:
    prompts = lab.folder / "prompts.json"
    content = {"cfgs": [1.0], "num_inference_steps": 1, "resolution": 64, "samples": [{"prompt": "blue tree"}]}
    prompts.write_text(json.dumps(content))
    assert lab.run().samples == []
    names = [f"gs0000{update}-000-blue-tree.jpg" for update in (0, 1)]
    assert lab.run(sample_prompts=str(prompts), max_steps=1).samples == names, "before the first and after the last"


@row("sample_steps")
def samples_come_so_often(lab: Lab) -> None:
    file = one_sample(lab, generate_pretrain_samples=False)
    names = [lab.run(sample_prompts=file, sample_steps=steps, max_steps=3).samples for steps in (1, 2)]
    assert [name[:7] for name in names[0]] == ["gs00001", "gs00002", "gs00003"]
    assert [name[:7] for name in names[1]] == ["gs00002", "gs00003"], "and of the finished run"


# --- checkpoints


@row("save_ckpt_dir")
def single_files_go_there(lab: Lab) -> None:
    place = lab.folder / "single files"
    lab.run(no_save_ckpt=False, save_ckpt_dir=str(place))
    assert [path.name for path in place.iterdir()] == ["last-lab-ep00-gs00002.safetensors"]


@row("no_save_ckpt")
def no_single_file_is_written(lab: Lab) -> None:
    place = lab.folder / "none"
    assert lab.run(no_save_ckpt=True, save_ckpt_dir=str(place)).code == 0
    assert not place.exists()
    assert (lab.run(no_save_ckpt=True, save_ckpt_dir=str(place)).last / "unet").is_dir()


@row("ckpt_every_n_minutes")
def checkpoints_come_by_the_clock(lab: Lab) -> None:
    assert lab.run(ckpt_every_n_minutes=0, max_steps=3).ckpts == [
        "lab-ep00-gs00001",
        "lab-ep00-gs00002",
        "last-lab-ep01-gs00003",
    ]
    assert lab.run(ckpt_every_n_minutes=60).ckpts == ["last-lab-ep00-gs00002"]


BY_EPOCH: dict[str, Any] = {"max_epochs": 5, "max_steps": None, "batch_size": 6}


@row("save_every_n_epochs")
def checkpoints_come_by_the_epoch(lab: Lab) -> None:
    assert lab.run(save_every_n_epochs=2, **BY_EPOCH).ckpts == [
        "lab-ep02-gs00002",
        "lab-ep04-gs00004",
        "last-lab-ep05-gs00005",
    ]


@row("save_ckpts_from_n_epochs")
def early_epochs_are_not_saved(lab: Lab) -> None:
    assert lab.run(save_every_n_epochs=2, save_ckpts_from_n_epochs=3, **BY_EPOCH).ckpts == [
        "lab-ep04-gs00004",
        "last-lab-ep05-gs00005",
    ]


@row("save_full_precision")
def exports_are_whole(lab: Lab) -> None:
    from safetensors.torch import load_file

    for on, dtype in ((False, torch.float16), (True, torch.float32)):
        tensors = load_file(lab.run(save_full_precision=on).last / "unet/diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@row("save_optimizer")
def every_checkpoint_keeps_its_state(lab: Lab) -> None:
    saves = {"ckpt_every_n_minutes": 0, "max_steps": 3}
    for on, kept in ((False, 2), (True, 3)):
        folder = lab.run(save_optimizer=on, **saves).folder
        assert len(list(folder.glob("ckpts/*/training_state"))) == kept


@row("keep_last_n")
def old_checkpoints_go(lab: Lab) -> None:
    saves = {"ckpt_every_n_minutes": 0, "max_steps": 3}
    assert lab.run(keep_last_n=2, **saves).ckpts == ["lab-ep00-gs00002", "last-lab-ep01-gs00003"]


@row("trigger_words")
def they_stand_in_the_single_file(lab: Lab) -> None:
    from safetensors import safe_open

    place = lab.folder / "words"
    lab.run(trigger_words="zorp, a zorp", no_save_ckpt=False, save_ckpt_dir=str(place), max_steps=1)
    (path,) = place.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "zorp, a zorp"


@row("no_prepend_last")
def the_last_one_has_a_plain_name(lab: Lab) -> None:
    assert lab.run(no_prepend_last=True, max_steps=1).ckpts == ["lab-ep00-gs00001"]


# --- logs


@row("log_step")
def scalars_come_so_often(lab: Lab) -> None:
    def logged(every: int) -> list[int]:
        rows = lab.run(log_step=every, max_steps=3).metrics
        return [row["update"] for row in rows if "loss/log_step" in row]

    assert logged(1) == [1, 2, 3]
    assert logged(2) == [2, 3], "and at the end"


@row("validation_config")
def pictures_are_held_out_and_watched(lab: Lab) -> None:
    file = lab.write("validation.json", {"auto_split_proportion": 0.34})
    outcome = lab.run(validation_config=file)
    assert len(outcome.scalars("loss/val")) == 2, "before the first update and after the last"
    assert "6 pictures, 4 to train on" in outcome.told
    assert not lab.run().scalars("loss/val")


@contextlib.contextmanager
def weights_and_biases() -> Iterator[WandbDouble]:
    with pytest.MonkeyPatch.context() as patch:
        double = WandbDouble()
        patch.setitem(sys.modules, "wandb", double)
        yield double


@row("wandb")
def scalars_are_mirrored(lab: Lab) -> None:
    with weights_and_biases() as wandb:
        outcome = lab.run(wandb=True, max_steps=1, project_name="mirrored")
        sent = [row["loss/log_step"] for row in wandb.rows if "loss/log_step" in row]
        assert sent == outcome.scalars("loss/log_step")
    with weights_and_biases() as wandb:
        lab.run(max_steps=1, project_name="alone")
        assert not wandb.rows


# --- device


@row("device")
def it_runs_there(lab: Lab) -> None:
    assert "CPU, 1 threads" in lab.run().told
    outcome = lab.run(device="cuda", max_steps=1)
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in outcome.told
    else:
        assert outcome.code == 2
        assert "torch sees no GPU" in outcome.told


@row("gpuid")
def it_runs_on_that_gpu(lab: Lab) -> None:
    from utils.device import open_device
    from utils.errors import UserError

    chosen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        # A machine with two GPUs, as far as the choice between them goes.
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "set_device", chosen.append)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", str)
        patch.setattr("accelerate.PartialState", lambda **_: type("One", (), {"num_processes": 1}))
        for gpuid in (0, 1):
            assert open_device(lab.options(device="cuda", gpuid=gpuid).device).torch_device.index == gpuid
        with pytest.raises(UserError, match="gpuid = 2"):
            open_device(lab.options(device="cuda", gpuid=2).device)
    assert chosen == [0, 1]


@row("amp_dtype")
def networks_compute_in_it(lab: Lab) -> None:
    half, scaled = lab.run(amp_dtype="bf16", max_steps=1), lab.run(amp_dtype="fp16", max_steps=1)
    assert [each.told.count(f", {word};") for each, word in ((half, "bf16"), (scaled, "fp16"))] == [1, 1]
    losses = {each.scalars("loss/log_step")[0] for each in (half, scaled, lab.run(max_steps=1))}
    assert len(losses) == 3
    assert max(losses) - min(losses) < 0.05
    assert scaled.scalars("hyperparameter/grad scale") == pytest.approx([2**17.5])
    assert not half.scalars("hyperparameter/grad scale")


@row("disable_amp")
def networks_compute_in_fp32(lab: Lab) -> None:
    outcome = lab.run(amp_dtype="bf16", disable_amp=True, max_steps=1)
    assert same(outcome.weights("unet"), lab.run(max_steps=1).weights("unet"))


@row("deterministic")
def only_deterministic_algorithms_run(lab: Lab) -> None:
    lab.run(max_steps=1)
    assert not torch.are_deterministic_algorithms_enabled()
    config, logdir = lab.config(max_steps=1, deterministic=True)
    assert lab.start(["--config", config], logdir).code == 0
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("option", sorted(ROWS))
def test_option_has_its_effect(option: str, lab: Lab) -> None:
    ROWS[option](lab)


@pytest.mark.slow
@pytest.mark.parametrize("option", sorted(ROWS.keys() - {"config"}))
def test_row_fails_when_the_option_is_ignored(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: accepted, checked, and then not looked at."""
    import training.inputs
    import utils.options

    assemble = utils.options.assemble

    def deaf(given: Mapping[str, Any]) -> Options:
        return assemble({name: value for name, value in given.items() if name != option})

    fresh = Lab(tmp_path)
    for module in (utils.options, training.inputs):
        monkeypatch.setattr(module, "assemble", deaf)
    with pytest.raises((Exception, pytest.fail.Exception)):
        ROWS[option](fresh)
