"""Everything random of a training step, drawn where the pixels are made: timesteps, noise and perturbations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from utils.config import NoiseOptions
from utils.seeding import stream, tensor_stream

PYRAMID_LEVELS = 10


class ItemLike(Protocol):
    """What a draw needs of an item."""

    @property
    def id(self) -> str:
        """Names the item's streams."""


class VisitLike(Protocol):
    """What a draw needs of a visit."""

    @property
    def item(self) -> ItemLike:
        """The image."""

    @property
    def epoch(self) -> int:
        """From 0."""

    @property
    def repeat(self) -> int:
        """Uses of the same item before, in this epoch."""


class RequestLike(Protocol):
    """A micro-batch, and where it stands in its update (which only stratified timesteps look at)."""

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height in pixels."""

    @property
    def visits(self) -> Sequence[VisitLike]:
        """One for each row of the draws."""

    @property
    def update(self) -> int:
        """Number of the update in its epoch."""

    @property
    def first(self) -> int:
        """Place of the first visit among the images of the update."""

    @property
    def images(self) -> int:
        """Images of the update."""


@dataclass(slots=True)
class Draws:
    """The draws of a micro-batch, one row a visit.

    Args:
        timesteps: int64 (B,).
        noise: float32 (B, C, h, w), offset and pyramid noise included.
        latent_noise: float32 (B, C, h, w), unit normal; picks the sample of the VAE's distribution.
        embedding_noise: float32 (B, 77, W), unit normal, if the text embedding is perturbed.
        input_noise: float32 (B, C, h, w), unit normal, if the UNet's input is perturbed.
    """

    timesteps: Tensor
    noise: Tensor
    latent_noise: Tensor
    embedding_noise: Tensor | None = None
    input_noise: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Draws:
        """The same draws on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Draws:
        """The same draws in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of the visits from `start` to before `stop`: a micro-batch cut in two keeps its draws."""
        return self._each(lambda tensor: tensor[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        return Draws(
            change(self.timesteps),
            change(self.noise),
            change(self.latent_noise),
            None if self.embedding_noise is None else change(self.embedding_noise),
            None if self.input_noise is None else change(self.input_noise),
        )


@dataclass(frozen=True, slots=True)
class Drawer:
    """Makes the draws of a micro-batch; plain numbers only, so that workers can be given one by any start method.

    Every part of a visit's draws has its own stream under ("noise", epoch, item id, repeat): the company in the batch
    does not matter, and an option that adds a draw leaves the others as they were.

    Args:
        vae_factor: pixels to a latent along a side, 8 for Stable Diffusion.
        context_shape: tokens and width of the text embedding, such as (77, 768).
    """

    options: NoiseOptions
    seed: int
    latent_channels: int
    vae_factor: int
    context_shape: tuple[int, int]

    def __call__(self, request: RequestLike) -> Draws:
        """The draws for `request`, on the CPU."""
        width, height = request.bucket
        shape = (self.latent_channels, height // self.vae_factor, width // self.vae_factor)
        visits = request.visits
        options = self.options
        return Draws(
            timesteps=torch.tensor([self._timestep(request, row) for row in range(len(visits))], dtype=torch.int64),
            noise=torch.stack([self._noise(visit, shape) for visit in visits]),
            latent_noise=self._normal(visits, "latent", shape),
            embedding_noise=self._normal(visits, "embedding", self.context_shape)
            if options.embedding_perturbation
            else None,
            input_noise=self._normal(visits, "input", shape) if options.input_perturbation else None,
        )

    def _stream(self, visit: VisitLike, part: str) -> Generator:
        return tensor_stream(self.seed, "noise", visit.epoch, visit.item.id, visit.repeat, part)

    def _normal(self, visits: Sequence[VisitLike], part: str, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=self._stream(visit, part)) for visit in visits])

    def _timestep(self, request: RequestLike, row: int) -> int:
        visit = request.visits[row]
        rng = stream(self.seed, "noise", visit.epoch, visit.item.id, visit.repeat, "timestep")
        sampling = self.options.timestep_sampling
        if sampling == "logit_normal":
            share = 1 / (1 + math.exp(-rng.gauss(0.0, 1.0)))
        elif sampling == "stratified":
            # The turn makes every place of the update equally likely to get any stratum: a bucket that always
            # stands first would otherwise always get the small timesteps.
            turn = stream(self.seed, "strata", visit.epoch, request.update).randrange(request.images)
            share = ((request.first + row + turn) % request.images + rng.random()) / request.images
        else:
            share = rng.random()
        start, end = self.options.timestep_start, self.options.timestep_end
        return min(start + int(share * (end - start)), end - 1)

    def _noise(self, visit: VisitLike, shape: tuple[int, int, int]) -> Tensor:
        noise = torch.randn(shape, generator=self._stream(visit, "base"))
        discount, ratio = self.options.pyramid_noise_discount, self.options.zero_frequency_noise_ratio
        if discount:
            noise = pyramid_noise(noise, discount, self._stream(visit, "pyramid"))
        if ratio > 0:
            noise += ratio * torch.randn((shape[0], 1, 1), generator=self._stream(visit, "offset"))
        return noise


def pyramid_noise(noise: Tensor, discount: float, generator: Generator) -> Tensor:
    """Multi-resolution noise of unit standard deviation, (C, h, w) like `noise`, which is its finest level.

    Level i adds `discount`^i times normal noise whose sides are r^i smaller than the level's before, r ~ U(2, 4),
    enlarged bilinearly; it ends at a side of one pixel or after ten levels.
    https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training--VmlldzozNjYyOTU2
    """
    channels, height, width = noise.shape
    rows, columns = float(height), float(width)
    total = noise.clone()
    for level in range(PYRAMID_LEVELS):
        shrink = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        rows, columns = max(1.0, rows / shrink), max(1.0, columns / shrink)
        coarse = torch.randn((1, channels, int(rows), int(columns)), generator=generator)
        total += discount**level * interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
        if int(rows) == 1 or int(columns) == 1:
            break
    return total / total.std()
