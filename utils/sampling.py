"""Samples: pictures that the live networks draw, as the exported model would, without the run noticing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from utils.borrow import undisturbed
from utils.models import Models, encode_text, noise_scheduler, tokenize
from utils.prompt_weights import weigh, weighted_tokens
from utils.prompts import SampleJob, SampleSheet

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# How far a guided prediction is brought back to the spread of the unguided one (arXiv 2305.08891, section 3.4).
GUIDANCE_RESCALE = 0.7
_SMALLEST_ALPHA = 2**-24

_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddpm": ("DDPMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


def sample_pictures(
    models: Models,
    sheet: SampleSheet,
    *,
    clip_skip: int = 0,
    zero_terminal_snr: bool = False,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager[Any] | None = None,
) -> list[list[Image]]:
    """For each job of `sheet`, in order, its pictures: RGB, one for each of its guidance scales, from the same noise.

    Text encoding, clip skip, noise schedule and empty prompt are those of the training and of the export. The
    networks and every global generator are left as they were. Jobs of one size and guidance go through together,
    `sheet.batch_size` at most; each job has a generator of its own, so company does not change its draws.
    """
    networks = (models.unet, models.text_encoder, models.vae)
    found: dict[tuple[int, float], Image] = {}
    with (
        undisturbed(*networks, device=device),
        nullcontext() if autocast is None else autocast,
        _pipeline(models, sheet, zero_terminal_snr) as pipeline,
    ):
        for jobs, cfg in _batches(sheet):
            pictures = _draw(pipeline, models, jobs, cfg, sheet.steps, clip_skip, zero_terminal_snr, device)
            found |= {(job.index, cfg): picture for job, picture in zip(jobs, pictures, strict=True)}
    return [[found[job.index, cfg] for cfg in job.cfgs] for job in sheet.jobs]


def _batches(sheet: SampleSheet) -> Iterator[tuple[list[SampleJob], float]]:
    """Jobs of one size with one guidance scale, `batch_size` at most."""
    wanted = [(job.width, job.height, cfg, job.index) for job in sheet.jobs for cfg in dict.fromkeys(job.cfgs)]
    jobs = {job.index: job for job in sheet.jobs}
    for (_, _, cfg), group in groupby(sorted(wanted), key=lambda want: want[:3]):
        members = [jobs[index] for *_, index in group]
        for start in range(0, len(members), sheet.batch_size):
            yield members[start : start + sheet.batch_size], cfg


@contextmanager
def _pipeline(models: Models, sheet: SampleSheet, zero_terminal_snr: bool) -> Iterator[Any]:
    """Diffusers' own pipeline around the live networks."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    # Their warnings are about safety checkers, image processors and defaults that are not in play here.
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    config = models.unet._internal_dict
    try:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            unet=models.unet,
            scheduler=sample_scheduler(models, sheet.scheduler, zero_terminal_snr=zero_terminal_snr),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # None: a bar on a terminal, and none in a file that somebody will read.
        pipeline.set_progress_bar_config(disable=None if sheet.show_progress else True, leave=False)
        yield pipeline
    finally:
        models.unet._internal_dict = config  # the pipeline "mends" the sample size of very old configurations
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])


def _draw(
    pipeline: Any,
    models: Models,
    jobs: Sequence[SampleJob],
    cfg: float,
    steps: int,
    clip_skip: int,
    zero_terminal_snr: bool,
    device: torch.device | str,
) -> list[Image]:
    latents = pipeline(
        prompt_embeds=_embed(models, [(job.prompt, job.weighted) for job in jobs], clip_skip, device),
        negative_prompt_embeds=_embed(models, [(job.negative_prompt, job.weighted) for job in jobs], clip_skip, device),
        width=jobs[0].width,
        height=jobs[0].height,
        num_inference_steps=steps,
        guidance_scale=cfg,
        guidance_rescale=GUIDANCE_RESCALE if zero_terminal_snr or models.zero_terminal_snr else 0.0,
        # A plain generator, not a named stream: the seed beside the picture draws it again in any Diffusers program.
        generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        output_type="latent",
    ).images
    # One by one: decoding needs several times the memory of a denoising step.
    return [_decode(pipeline, models, latent[None]) for latent in latents]


def _embed(models: Models, prompts: Sequence[tuple[str, bool]], clip_skip: int, device: torch.device | str) -> Tensor:
    """The contexts of `prompts` (text, whether its words are weighed), as the training makes them."""
    embedding = encode_text(models.text_encoder, tokenize(models, [text for text, _ in prompts]).to(device), clip_skip)
    if not any(weighted for _, weighted in prompts):
        return embedding
    rows = []
    for row, (text, weighted) in enumerate(prompts):
        if weighted:
            tokens, weights = (part.to(device) for part in weighted_tokens(models, text))
            rows.append(weigh(encode_text(models.text_encoder, tokens, clip_skip), weights)[0])
        else:
            rows.append(embedding[row])
    return torch.stack(rows)


def _decode(pipeline: Any, models: Models, latent: Tensor) -> Image:
    scaled = (latent / models.latent_scale).to(models.vae.dtype)
    pixels = models.vae.decode(scaled, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pil")[0]  # type: ignore[no-any-return]


def sample_scheduler(models: Models, name: str, *, zero_terminal_snr: bool = False) -> Any:
    """A fresh Diffusers scheduler `name` (`_k`: with the noise levels of Karras, arXiv 2206.00364) for `models`.

    It has the model's own schedule and prediction type. With `zero_terminal_snr`, or when the model is marked so, the
    betas are rescaled and the timesteps trail, so that sampling begins at pure noise (arXiv 2305.08891).
    """
    import diffusers

    class_name, settings = _CLASSES[name.removesuffix("_k")]
    cls = getattr(diffusers, class_name)
    config = {key: value for key, value in models.scheduler_config.items() if not key.startswith("_")}
    # What every Stable Diffusion pipeline insists on, whatever the folder says.
    config |= {"prediction_type": models.prediction_type, "clip_sample": False, "steps_offset": 1, **settings}
    if class_name != "DDIMScheduler":
        config["thresholding"] = False
    if name.endswith("_k"):
        config["use_karras_sigmas"] = True
    if zero_terminal_snr or models.zero_terminal_snr:
        config |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        # DDIM and DDPM divide by the last alpha to turn a predicted noise into a picture.
        divides = models.prediction_type == "epsilon" and class_name in ("DDIMScheduler", "DDPMScheduler")
        if divides or "rescale_betas_zero_snr" not in inspect.signature(cls).parameters:
            config["rescale_betas_zero_snr"] = False
            config["trained_betas"] = _nearly_zero_snr_betas(models).tolist()
    known = set(inspect.signature(cls).parameters)
    return _from_its_first_step(cls.from_config({key: value for key, value in config.items() if key in known}))


def _from_its_first_step(scheduler: Any) -> Any:
    """`scheduler`, told that sampling begins at the first of its timesteps.

    It would look for that one by value, and takes the second of several equal ones. Near pure noise the levels of
    Karras lie so close that their rounded timesteps are equal: a step was lost, and KDPM2 ended in NaN.
    """
    if hasattr(scheduler, "set_begin_index"):
        plain = scheduler.set_timesteps

        @wraps(plain)
        def set_timesteps(*arguments: Any, **named: Any) -> None:
            plain(*arguments, **named)
            scheduler.set_begin_index(0)

        scheduler.set_timesteps = set_timesteps
    return scheduler


def _nearly_zero_snr_betas(models: Models) -> Tensor:
    """The rescaled betas for classes that cannot do without a last alpha: as small as Diffusers makes it elsewhere."""
    alphas = noise_scheduler(models, zero_terminal_snr=True).alphas_cumprod.double().clone()
    alphas[-1] = _SMALLEST_ALPHA
    betas: Tensor = 1 - alphas / alphas.roll(1)
    betas[0] = 1 - alphas[0]
    return betas
