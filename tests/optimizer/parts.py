"""Real parts at tiny sizes: requests, schedules, networks and settings that the tests of optimizer/ share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.item import Bucket, Caption, Item, Visit
from optimizer.build import Memory, Part, build_part
from optimizer.settings import PartSettings, part_settings
from utils.config import OptimizerOptions
from utils.optimizer_file import Freezing, parse_optimizer_file


@dataclass(frozen=True)
class Asked:
    """A micro-batch as workers are asked for it."""

    bucket: tuple[int, int]
    visits: tuple[Visit, ...]
    first: int
    images: int
    update: int = 0


def visit(name: str, *, epoch: int = 0, repeat: int = 0) -> Visit:
    """A visit of a square picture."""
    item = Item(id=name, path=name, width=64, height=64, caption=Caption("a dot"))
    return Visit(item, Bucket(64, 64), epoch, repeat)


def asked(
    names: Sequence[str], *, side: int = 64, first: int = 0, images: int | None = None, update: int = 0, epoch: int = 0
) -> Asked:
    """A request for one visit of each of `names`."""
    visits = tuple(visit(name, epoch=epoch) for name in names)
    return Asked((side, side), visits, first, len(names) if images is None else images, update)


def alphas_cumprod(*, zero_snr: bool = False) -> Tensor:
    """Stable Diffusion's schedule, (1000,)."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    table: Tensor = scheduler.alphas_cumprod
    return table


def settings(base: dict[str, Any], **options: Any) -> PartSettings:
    """Settings of a UNet whose optimizer file says `base`."""
    file = parse_optimizer_file({"base": base}, "optimizer.json")
    return part_settings(file, OptimizerOptions(**options), 1).unet


def small_network(seed: int = 0) -> nn.Module:
    """A network with a weight large enough for 8-bit moments and some that are not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 80), nn.SiLU(), nn.Linear(80, 8))


def small_part(
    base: dict[str, Any], *, seed: int = 0, memory: Memory | None = None, updates: int = 20, **options: Any
) -> Part:
    """A part over `small_network`."""
    return build_part(
        "unet",
        small_network(seed),
        settings(base, **options),
        Freezing(),
        total_updates=updates,
        device_type="cpu",
        memory=Memory() if memory is None else memory,
    )


def losses(part: Part, step: int, *, batch: int = 4) -> Tensor:
    """A loss of each of `batch` images of update `step`, (B,), through the part's network."""
    generator = torch.Generator().manual_seed(step)
    pictures = torch.randn(batch, 64, generator=generator)
    wanted = 3 * pictures[:, :8]
    dtype = next(part.module.parameters()).dtype
    answer: Tensor = part.module(pictures.to(dtype)).float()
    return (answer - wanted).square().mean(1)


def copies(part: Part) -> dict[str, Tensor]:
    """The trained weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in part.parameters.items()}
