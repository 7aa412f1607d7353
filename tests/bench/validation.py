"""How much chance is left in a validation number, on the starter's model: `python -m tests.bench.validation`.

The standard error over seeds of the fixed grid, beside that of one random timestep for each of the same images.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.buckets import compute_buckets, nearest_bucket
from data.probes import Probe, Validation
from data.sources import find_data
from data.validation import WatchedSet, hold_out
from data.validation_file import VALIDATION
from optimizer.objective import Moments, Networks, Objective, build_objective, to_unit_range
from optimizer.probe import probe_losses
from utils.config import DeviceOptions, LossOptions, NoiseOptions
from utils.device import open_device
from utils.forward import embed_text, encode_image, predict_noise
from utils.models import Models, load_models, noise_scheduler, tokenize

LIMIT = 0.25


def losses(models: Models, networks: Networks, objective: Objective, probe: Probe) -> dict[str, Tensor]:
    """The losses of a probe."""
    tokens = tokenize(models, probe.captions)
    return probe_losses(networks, objective, probe.latents, tokens, probe.timesteps, probe.noise)


def main() -> None:
    """Print both standard errors and their ratio; exit 1 when it is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("starter/model"))
    parser.add_argument("--pictures", type=Path, default=Path("starter/pictures"))
    parser.add_argument("--seeds", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = open_device(DeviceOptions(device="cpu"))
    models = load_models(options.model)
    networks = Networks(
        partial(predict_noise, models.unet, device),
        partial(embed_text, models.text_encoder, device, 0, False),
        lambda pixels: Moments(*encode_image(models.vae, device, pixels)),
    )
    alphas = noise_scheduler(models).alphas_cumprod
    objective = build_objective(
        alphas, models.prediction_type, LossOptions(), NoiseOptions(), latent_scale=models.latent_scale
    )
    buckets = compute_buckets(64, 16)
    _, held_out = hold_out(find_data(str(options.pictures)).items, 0.15, 555)

    def watch(seed: int) -> Validation:
        return Validation(
            [WatchedSet(VALIDATION, held_out)],
            lambda item: nearest_bucket(item.width, item.height, buckets),
            lambda pixels: networks.encode_image(to_unit_range(pixels)).mean,
            (0, 1000),
            seed=seed,
            batch_size=4,
        )

    ask = partial(losses, models, networks, objective)
    with torch.no_grad():
        grid = [watch(seed).run(0, ask)["loss/val"] for seed in range(options.seeds)]
        chance = [one_random_timestep(watch(0), held_out, ask, seed) for seed in range(options.seeds)]
    ratio = statistics.stdev(grid) / statistics.stdev(chance)
    means = f"{statistics.mean(grid):.5f} and {statistics.mean(chance):.5f}"
    print(f"{len(held_out)} images, {options.seeds} seeds, means {means}")
    print(f"standard error: grid {statistics.stdev(grid):.5f}, one random timestep {statistics.stdev(chance):.5f}")
    print(f"ratio {ratio:.3f} (limit {LIMIT})")
    raise SystemExit(ratio > LIMIT)


def one_random_timestep(validation: Validation, items: tuple[object, ...], ask: object, seed: int) -> float:
    """The mean loss of the same images, each at one timestep drawn for `seed`."""
    assert callable(ask)
    watched = validation._prepare(validation.sets[0])
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for item, latent in zip(watched.items, watched.latents, strict=True):
        timesteps = torch.randint(0, 1000, (1,), generator=generator)
        noise = torch.randn(latent[None].shape, generator=generator)
        total += float(ask(Probe(latent[None], (validation._caption(item),), timesteps, noise))["mse"])
    return total / len(items)


if __name__ == "__main__":
    main()
