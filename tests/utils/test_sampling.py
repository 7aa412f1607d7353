"""Samples are what plain Diffusers draws from the exported folder, and leave no trace in the run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from starter.make_model import random_model
from utils.models import Models, load_models
from utils.prompts import SCHEDULER_NAMES, SampleJob, SampleSheet
from utils.sampling import sample_pictures, sample_scheduler

JOB = SampleJob(0, "a red circle", "", 7, 64, 64, (4.0, 1.01))
SHEET = SampleSheet((JOB,), steps=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return load_models(folder)


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return plain_pipeline(folder)


def plain_pipeline(folder: Path) -> Any:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.first_config = pipeline.scheduler.config
    return pipeline


def plain_diffusers(pipeline: Any, scheduler: str, job: SampleJob, cfg: float, **settings: Any) -> Any:
    import diffusers

    overrides = settings.pop("scheduler_settings", {})
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.first_config, **overrides)
    clip_skip = settings.pop("clip_skip", 0)
    return pipeline(
        **_embeddings(pipeline, job, clip_skip),
        width=job.width,
        height=job.height,
        num_inference_steps=settings.pop("steps", SHEET.steps),
        guidance_scale=cfg,
        generator=torch.Generator().manual_seed(job.seed),
        **settings,
    ).images[0]


def _embeddings(pipeline: Any, job: SampleJob, clip_skip: int) -> dict[str, Any]:
    """What the pipeline makes of the prompts; its own clip_skip does not know Transformers 5 yet."""
    if not clip_skip:
        return {"prompt": job.prompt, "negative_prompt": job.negative_prompt}
    found = {}
    for name, text in (("prompt_embeds", job.prompt), ("negative_prompt_embeds", job.negative_prompt)):
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
            found[name] = pipeline.text_encoder.final_layer_norm(states[-clip_skip])
    return found


# What each name is in Diffusers' own words, as its documentation translates those of other programs.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_scheduler_equals_plain_diffusers(models: Models, pipeline: Any, name: str) -> None:
    job = replace(JOB, negative_prompt="blue", cfgs=(4.0,), width=32, height=24)
    (ours,) = sample_pictures(models, replace(SHEET, jobs=(job,), scheduler=name, steps=4))
    scheduler, settings = DIFFUSERS[name.removesuffix("_k")]
    karras = {"use_karras_sigmas": True} if name.endswith("_k") else {}
    theirs = plain_diffusers(pipeline, scheduler, job, 4.0, steps=4, scheduler_settings=settings | karras)
    assert abs(pixels(ours[0]) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_equal_to_plain_diffusers_with_clip_skip(models: Models, pipeline: Any, clip_skip: int) -> None:
    job = replace(JOB, negative_prompt="blue", cfgs=(4.0,), width=64, height=48)
    (ours,) = sample_pictures(models, replace(SHEET, jobs=(job,), scheduler="euler_a"), clip_skip=clip_skip)
    theirs = plain_diffusers(pipeline, "EulerAncestralDiscreteScheduler", job, 4.0, clip_skip=clip_skip)
    assert abs(pixels(ours[0]) - pixels(theirs)).max() <= 1


def test_clip_skip_matters(models: Models) -> None:
    zero, two = (sample_pictures(models, SHEET, clip_skip=skip)[0][0] for skip in (0, 2))
    assert abs(pixels(zero) - pixels(two)).max() > 1


def test_zero_terminal_snr_equals_plain_diffusers_with_the_same_settings(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "v", prediction_type="v_prediction")
    models = load_models(folder)
    (ours,) = sample_pictures(models, SHEET, zero_terminal_snr=True)
    theirs = plain_diffusers(
        plain_pipeline(folder),
        "DDIMScheduler",
        JOB,
        4.0,
        guidance_rescale=0.7,
        scheduler_settings={"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    )
    assert abs(pixels(ours[0]) - pixels(theirs)).max() <= 1
    (without,) = sample_pictures(models, SHEET)
    assert abs(pixels(ours[0]) - pixels(without[0])).max() > 1


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_scheduler_draws(models: Models, name: str, zero: bool) -> None:
    sheet = replace(SHEET, jobs=(replace(JOB, width=16, height=16, cfgs=(2.0,)),), steps=3, scheduler=name)
    ((picture,),) = sample_pictures(models, sheet, zero_terminal_snr=zero)
    assert picture.size == (16, 16)
    assert pixels(picture).std() > 5, "a flat picture is one of NaN"


def test_karras_levels_and_zero_snr_reach_the_scheduler(models: Models) -> None:
    assert sample_scheduler(models, "euler_k").config.use_karras_sigmas
    assert not sample_scheduler(models, "euler").config.use_karras_sigmas
    assert sample_scheduler(models, "dpm++_2m_sde").config.algorithm_type == "sde-dpmsolver++"
    for name in ("lms", "pndm", "dpm++_2s"):
        scheduler = sample_scheduler(models, name, zero_terminal_snr=True)
        assert 0 < float(scheduler.alphas_cumprod[-1]) < 1e-6
        assert scheduler.config.get("timestep_spacing", "trailing") == "trailing"


@pytest.mark.parametrize("name", [name for name in SCHEDULER_NAMES if name.endswith("_k")])
def test_levels_that_lie_close_are_all_taken(models: Models, name: str) -> None:
    """With zero terminal SNR several timesteps of Karras are 999; sampling must begin at the first of them."""
    scheduler = sample_scheduler(models, name, zero_terminal_snr=True)
    scheduler.set_timesteps(30)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        answer = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(0.1 * answer, timestep, latents).prev_sample
    assert latents.isfinite().all()
    assert scheduler.step_index == len(scheduler.timesteps)


def test_the_run_does_not_notice(models: Models) -> None:
    models.unet.train()
    models.unet.requires_grad_(True)
    before = {name: value.clone() for name, value in models.unet.state_dict().items()}
    config = dict(models.unet.config)
    states = torch.get_rng_state(), random.getstate()
    sample_pictures(models, replace(SHEET, scheduler="euler_a"))
    assert models.unet.training
    assert not models.vae.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in models.unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in models.unet.state_dict().items())
    assert dict(models.unet.config) == config
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    models.unet.eval()
    models.unet.requires_grad_(False)


def test_bars_are_for_terminals(models: Models, capfd: pytest.CaptureFixture[str]) -> None:
    sheet = replace(SHEET, jobs=(replace(JOB, width=16, height=16, cfgs=(2.0,)),), steps=2, show_progress=True)
    sample_pictures(models, sheet)
    assert "2/2" not in capfd.readouterr().err


def test_company_does_not_change_a_picture(models: Models) -> None:
    jobs = tuple(replace(JOB, index=index, prompt=f"prompt {index}", seed=index) for index in range(3))
    wide = replace(JOB, index=3, width=96)
    together = sample_pictures(models, SampleSheet((*jobs, wide), steps=4, batch_size=2, scheduler="euler_a"))
    assert [strip[0].size for strip in together] == [(64, 64)] * 3 + [(96, 64)]
    for job, pictures in zip((*jobs, wide), together, strict=True):
        (alone,) = sample_pictures(models, SampleSheet((job,), steps=4, scheduler="euler_a"))
        for one, other in zip(pictures, alone, strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= 1


def test_a_context_for_the_precision(models: Models) -> None:
    plain = sample_pictures(models, SHEET)[0][0]
    half = sample_pictures(models, SHEET, autocast=torch.autocast("cpu", dtype=torch.bfloat16))[0][0]
    difference = abs(pixels(plain) - pixels(half))
    assert difference.max() > 0
    assert difference.mean() < 8
