"""How fast whole updates are, beside what the arithmetic allows, in one run: `python -m tests.bench.gpu` prints JSON.

Random weights of the true configuration and random pictures: the time does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.item import Bucket, Caption, Item, Visit
from optimizer.noise import Drawer, Draws
from optimizer.objective import Moments, Networks, Objective, diffusion_step
from optimizer.settings import part_settings
from optimizer.update import Updater
from training.parts import build_networks, build_parts, build_run_objective, build_updater
from utils.config import Options
from utils.device import Device, open_device
from utils.models import Models
from utils.optimizer_file import parse_optimizer_file
from utils.options import assemble
from utils.presets import preset
from utils.seeding import tensor_stream

# Forward and backward of the UNet of SD 1.5 at 512, counted with torch's FlopCounterMode.
UNET_TFLOP_AT_512 = 2.407
MATMUL_SIDE = 8192
COPY_BYTES = 4 * 2**30
SEED = 1


@dataclass(frozen=True)
class Asked:
    """A micro-batch, as the drawer is asked for it."""

    bucket: tuple[int, int]
    visits: tuple[Visit, ...]
    update: int
    first: int
    images: int


@dataclass(frozen=True)
class Bench:
    """The parts of an update.

    Args:
        side: of the square pictures, in pixels.
    """

    device: Device
    models: Models
    networks: Networks
    objective: Objective
    updater: Updater
    drawer: Drawer
    side: int


@dataclass(frozen=True)
class Pictures:
    """A batch as workers hand it over, in page-locked memory where there is a GPU.

    Args:
        what: pixels, or the VAE's moments of them.
    """

    what: Tensor | Moments
    input_ids: Tensor
    draws: Draws
    scales: Tensor

    def pinned(self) -> Pictures:
        """The same in page-locked memory."""
        what = (
            self.what.pin_memory() if isinstance(self.what, Tensor) else Moments(*(t.pin_memory() for t in self.what))
        )
        return Pictures(what, self.input_ids.pin_memory(), self.draws.pin_memory(), self.scales.pin_memory())

    def to(self, device: torch.device) -> Pictures:
        """The same on `device`; the host does not wait."""
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        what = move(self.what) if isinstance(self.what, Tensor) else Moments(*map(move, self.what))
        return Pictures(what, move(self.input_ids), self.draws.to(device, non_blocking=True), move(self.scales))


def random_models(device: torch.device, *, tiny: bool) -> Models:
    """SD 1.5 with random weights, made where they are used; `tiny` is a model for a test of this program."""
    files = preset("sd1", "epsilon")
    if tiny:
        from starter.networks import TINY, build_networks

        toys = build_networks(TINY, seed=SEED)
        networks: dict[str, Any] = {"unet": toys.unet, "text_encoder": toys.text_encoder, "vae": toys.vae}
    else:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with device:
            networks = {
                "unet": UNet2DConditionModel.from_config(dict(files.unet)),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(files.text_encoder))),
                "vae": AutoencoderKL.from_config(dict(files.vae)),
            }
    for network in networks.values():
        network.requires_grad_(False).eval()
    return Models(**networks, tokenizer=None, files=files, source="random weights")


def build_bench(options: Options, side: int, *, tiny: bool) -> Bench:
    """All parts of an update, as `train.py` builds them."""
    device = open_device(options.device)
    models = random_models(device.torch_device, tiny=tiny)
    file = parse_optimizer_file({"base": {"optimizer": "adamw"}}, "bench")
    settings = part_settings(file, options.optimizer, 1)
    parts = build_parts(models, options, settings, file, device, 1000)
    context = (models.max_tokens, models.context_width)
    return Bench(
        device=device,
        models=models,
        networks=build_networks(models, options, device),
        objective=build_run_objective(models, options, device),
        updater=build_updater(parts, options, file, SEED, device),
        drawer=Drawer(options.noise, SEED, models.latent_channels, models.vae_factor, context),
        side=side,
    )


def make_pictures(bench: Bench, batch: int, *, cached: bool) -> Pictures:
    """A batch of random pictures, or of random moments as a cache of latents would give them."""
    side, bucket = bench.side, Bucket(bench.side, bench.side)
    generator = tensor_stream(SEED, "bench")
    items = [Item(str(number), "", side, side, Caption("")) for number in range(batch)]
    visits = tuple(Visit(item, bucket, 0, 0) for item in items)
    draws = bench.drawer(Asked(bucket, visits, 0, 0, batch))
    what: Tensor | Moments = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
    if cached:
        what = Moments(torch.randn(draws.noise.shape, generator=generator), torch.full(draws.noise.shape, 0.1))
    words = int(bench.models.text_encoder.config.vocab_size)
    input_ids = torch.randint(0, words, (batch, bench.models.max_tokens), generator=generator)
    made = Pictures(what, input_ids, draws, torch.ones(batch))
    return made.pinned() if bench.device.is_cuda else made


def update(bench: Bench, pictures: Pictures, done: int) -> None:
    """A whole update: transfer, encoders, UNet, backward pass, norms, AdamW."""
    here = pictures.to(bench.device.torch_device)
    losses = diffusion_step(bench.networks, bench.objective, here.what, here.input_ids, here.draws)
    bench.updater.backward(losses, here.scales, len(here.scales), done=done, last=True)
    bench.updater.step(done)


def seconds_each(device: Device, work: Callable[[], object], times: int) -> float:
    """The median time of `work`, by the device's own clock where it has one: the host may run ahead."""
    if not device.is_cuda:
        marks = [time.perf_counter()]
        for _ in range(times):
            work()
            marks.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(marks))
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) for a, b in pairwise(events))) / 1000


def matmul_tflops(device: Device, side: int) -> float:
    """The rate of a large bf16 product of random matrices, TFLOP/s."""
    generator = torch.Generator(device.torch_device).manual_seed(SEED)
    options: dict[str, Any] = {"generator": generator, "device": device.torch_device, "dtype": torch.bfloat16}
    left, right = (torch.randn(side, side, **options) for _ in range(2))
    work = partial(torch.matmul, left, right)
    seconds_each(device, work, 3)
    return 2 * side**3 / seconds_each(device, work, 10) / 1e12


def copy_rate(device: Device, size: int) -> float:
    """The rate of a copy within the device's memory, TB/s read and written."""
    source = torch.ones(size // 4, device=device.torch_device)
    target = torch.empty_like(source)
    work = partial(target.copy_, source)
    seconds_each(device, work, 3)
    return 2 * source.nbytes / seconds_each(device, work, 10) / 1e12


def measure(bench: Bench, batch: int, *, cached: bool, updates: int, matmul: float, tiny: bool) -> dict[str, Any]:
    """The figures of one kind of update."""
    pictures = make_pictures(bench, batch, cached=cached)
    with FlopCounterMode(display=False) as counter:
        update(bench, pictures, 0)
    tflop = counter.get_total_flops() / batch / 1e12
    work = partial(update, bench, pictures, 1)
    seconds_each(bench.device, work, 3 if updates > 3 else 1)
    if bench.device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    pace = batch / seconds_each(bench.device, work, updates)
    row = {
        "batch": batch,
        "latents": "cached" if cached else "on line",
        "images_per_second": round(pace, 2),
        "tflop_per_image_counted": round(tflop, 6),
        "share_of_matmul_rate": round(pace * tflop / matmul, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if bench.device.is_cuda else None,
        "skipped_updates": bench.updater.skipped()[0],
    }
    if bench.side == 512 and not tiny:
        row["unet_ceiling_images_per_second"] = round(matmul / UNET_TFLOP_AT_512, 1)
        row["share_of_unet_ceiling"] = round(pace * UNET_TFLOP_AT_512 / matmul, 4)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy model: a test of this program, not a figure")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", help="4 and 16 when not given")
    parser.add_argument("--updates", type=int, help="20 when not given")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--gradient_checkpointing", action="store_true")
    asked = parser.parse_args(argv)
    if asked.tiny:
        torch.set_num_threads(1)  # more of them only wait for each other over toys
    side = 64 if asked.tiny else asked.resolution
    batches = ([1, 2] if asked.tiny else [4, 16]) if asked.batch is None else asked.batch
    updates = (3 if asked.tiny else 20) if asked.updates is None else asked.updates
    precision = {"disable_amp": True} if asked.precision == "fp32" else {"amp_dtype": asked.precision}
    given = {"device": asked.device, "gradient_checkpointing": asked.gradient_checkpointing, **precision}
    bench = build_bench(assemble(given), side, tiny=asked.tiny)
    matmul = matmul_tflops(bench.device, 256 if asked.tiny else MATMUL_SIDE)
    result = {
        "device": bench.device.name,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "model": "tiny" if asked.tiny else "SD 1.5, random weights",
        "resolution": side,
        "precision": bench.device.precision,
        "optimizer": {part.name: part.optimizer_name for part in bench.updater.parts},
        "gradient_checkpointing": asked.gradient_checkpointing,
        "matmul_tflop_per_second": round(matmul, 4),
        "copy_tb_per_second": round(copy_rate(bench.device, 2**24 if asked.tiny else COPY_BYTES), 4),
        "cases": [
            measure(bench, batch, cached=cached, updates=updates, matmul=matmul, tiny=asked.tiny)
            for batch in batches
            for cached in (False, True)
        ],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
