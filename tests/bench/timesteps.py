"""Variance of the loss of an update, by distribution of timesteps: `python -m tests.bench.timesteps --model FOLDER`."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from optimizer.noise import Drawer
from optimizer.objective import Moments, Networks, build_objective, diffusion_step
from starter.pretrain_unet import Shelf, fill_shelves
from starter.world import caption
from tests.optimizer.parts import asked
from utils.config import LossOptions, NoiseOptions
from utils.device import Device
from utils.forward import embed_text, predict_noise
from utils.models import Models, load_models, noise_scheduler, tokenize
from utils.seeding import stream

DEVICE = Device(torch.device("cpu"), "CPU", None)
SIDE = 64


@torch.no_grad()
def update_losses(models: Models, shelf: Shelf, sampling: str, *, updates: int, images: int) -> list[float]:
    """The loss of each of `updates` updates; pictures, captions and noise are the same for every `sampling`."""
    noise = NoiseOptions(timestep_sampling=sampling)
    shape = (models.max_tokens, models.context_width)
    drawer = Drawer(noise, 0, models.latent_channels, models.vae_factor, shape)
    alphas = noise_scheduler(models).alphas_cumprod
    objective = build_objective(alphas, models.prediction_type, LossOptions(), noise, latent_scale=models.latent_scale)

    def no_pixels(_pixels: Tensor) -> Moments:
        raise AssertionError("latents are given")

    networks = Networks(
        partial(predict_noise, models.unet, DEVICE),
        partial(embed_text, models.text_encoder, DEVICE, 0, False),
        no_pixels,
    )
    losses = []
    for update in range(updates):
        rows = stream(1, "pictures", update).sample(range(len(shelf.scenes)), images)
        words = [caption(shelf.scenes[row], stream(1, "words", row)) for row in rows]
        draws = drawer(asked([f"{update}/{row}" for row in rows], side=SIDE, update=update))
        moments = Moments(shelf.mean[rows], shelf.std[rows])
        losses.append(diffusion_step(networks, objective, moments, tokenize(models, words), draws).mean().item())
    return losses


def main() -> None:
    """Print mean and variance of the loss for each distribution, and the ratio to uniform."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Diffusers folder of the starter model")
    parser.add_argument("--updates", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models(options.model)
    shelves = fill_shelves(models.vae, seed=5, count=256)
    shelf = next(shelf for shelf in shelves if shelf.mean.shape[-2:] == (SIDE // 8, SIDE // 8))
    for images in (2, 4, 8, 16):
        found = {}
        for sampling in ("uniform", "stratified", "logit_normal"):
            losses = update_losses(models, shelf, sampling, updates=options.updates, images=images)
            found[sampling] = (statistics.fmean(losses), statistics.variance(losses))
        uniform = found["uniform"][1]
        for sampling, (mean, variance) in found.items():
            print(
                f"{images:2} images  {sampling:12} loss {mean:.4f}  variance {variance:.3e}  {variance / uniform:.3f}"
            )


if __name__ == "__main__":
    main()
