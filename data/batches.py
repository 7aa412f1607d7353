"""From a micro-batch to tensors: pixels, captions and every random draw of the training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from data.captions import render
from data.headers import PictureError
from data.item import Bucket, Item, MicroBatch, Visit
from data.pixels import load_pixels
from data.substitutes import substitutes
from utils.config import DataOptions
from utils.errors import printable
from utils.seeding import stream

BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}


class Movable(Protocol):
    """Draws of a micro-batch: tensors that travel with the pixels."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Any:
        """The same draws on `device`."""

    def pin_memory(self) -> Any:
        """The same draws in page-locked memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked for: a micro-batch, and where it stands in the epoch.

    Args:
        update: number of its update in the epoch, from 0.
        first: place of its first visit among the images of the update.
        images: images of the update.
    """

    micro_batch: MicroBatch
    update: int
    first: int
    images: int

    @property
    def bucket(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.micro_batch.bucket

    @property
    def visits(self) -> tuple[Visit, ...]:
        """The visits, in the order of the tensors' rows."""
        return self.micro_batch.visits


@dataclass(slots=True)
class Batch:
    """A micro-batch as the networks take it.

    Args:
        pixels: uint8 (B, 3, H, W): a quarter of the bytes of float32 on the way through shared memory.
        captions: as trained; "" where the caption was dropped.
        draws: everything random of the step.
        loss_scale: float32 (B,).
        failures: visits whose picture could not be decoded, with the reason; `visits` holds their substitutes.
    """

    visits: tuple[Visit, ...]
    pixels: torch.Tensor
    captions: tuple[str, ...]
    draws: Any
    loss_scale: torch.Tensor
    failures: tuple[tuple[Visit, str], ...] = ()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            draws=self.draws.to(device, non_blocking=non_blocking),
            loss_scale=self.loss_scale.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where it reaches a GPU without waiting."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            draws=self.draws.pin_memory(),
            loss_scale=self.loss_scale.pin_memory(),
        )

    def rows(self, start: int, stop: int) -> Batch:
        """The visits from `start` to before `stop`: a batch that does not fit into memory is cut, its draws stay."""
        return replace(
            self,
            visits=self.visits[start:stop],
            pixels=self.pixels[start:stop],
            captions=self.captions[start:stop],
            draws=self.draws.rows(start, stop),
            loss_scale=self.loss_scale[start:stop],
            failures=(),
        )


@dataclass(frozen=True, slots=True)
class Lost:
    """What a worker answers when a visit has neither a picture nor a substitute: an exception would bury the reason."""

    message: str

    def pin_memory(self) -> Lost:
        """Itself: there is nothing to pin."""
        return self


class _LostError(Exception):
    """Neither the picture of a visit nor a substitute can be decoded."""


class BatchSource(Dataset[Batch]):
    """Makes the batch for a request; workers hold these options, the drawer and the substitutes, no networks.

    Args:
        pools: for each bucket the items that may stand in for a picture that cannot be decoded.

    Attributes:
        dangerous: pictures that are not to be opened, because they take the worker with them; the reasons by id.
    """

    def __init__(
        self,
        options: DataOptions,
        seed: int,
        draw: Callable[[Request], Movable],
        pools: Mapping[Bucket, Sequence[Item]] | None = None,
    ) -> None:
        self.options, self.seed, self.draw = options, seed, draw
        self.pools = {} if pools is None else pools
        self.dangerous: dict[str, str] = {}

    def __getitem__(self, request: Request) -> Batch | Lost:  # type: ignore[override]
        try:
            return self._batch(request)
        except _LostError as error:
            return Lost(str(error))

    def _batch(self, request: Request) -> Batch:
        visits, pixels, failures = [], [], []
        for wanted in request.visits:
            visit, picture, reason = self._picture(wanted)
            visits.append(visit)
            pixels.append(picture)
            if reason is not None:
                failures.append((wanted, reason))
        micro_batch = MicroBatch(request.micro_batch.bucket, tuple(visits))
        return Batch(
            visits=micro_batch.visits,
            pixels=torch.stack(pixels),
            captions=tuple(caption_of(visit, self.options, self.seed) for visit in visits),
            draws=self.draw(replace(request, micro_batch=micro_batch)),
            loss_scale=torch.tensor([visit.item.loss_scale for visit in visits]),
            failures=tuple(failures),
        )

    def _picture(self, wanted: Visit) -> tuple[Visit, torch.Tensor, str | None]:
        """The pixels of `wanted`, or of its substitute with the reason why there is one."""
        reason: str | None = None
        pool = self.pools.get(wanted.bucket, ())
        for visit in chain([wanted], substitutes(wanted, pool, seed=self.seed)):
            try:
                return visit, self.pixels(visit), reason
            except PictureError as error:
                reason = str(error) if reason is None else reason
        raise _LostError(
            f"{printable(wanted.item.path)}: {reason}; and no other picture of its size can be trained in its place. "
            "Mend or remove it (--check_data finds all of them at once)"
        )

    def pixels(self, visit: Visit) -> torch.Tensor:
        """The pixels of `visit`, uint8 (3, H, W), by its own stream.

        Raises:
            PictureError: the picture cannot be decoded, with the reason.
        """
        item = visit.item
        if item.id in self.dangerous:
            raise PictureError(self.dangerous[item.id])
        flip_p = self.options.flip_p if item.flip_p is None else item.flip_p
        rng = stream(self.seed, "visit", visit.epoch, item.id, visit.repeat, "pixels")
        return load_pixels(
            item,
            visit.bucket,
            rng=rng,
            flip_p=flip_p,
            crop_jitter=self.options.crop_jitter,
            background=BACKGROUNDS[self.options.background],
        )


def caption_of(visit: Visit, options: DataOptions, seed: int) -> str:
    """The caption that `visit` is trained with: dropped, shuffled and shortened by its own stream.

    Captions and pixels draw from streams of their own, so that an option of one does not change the other.
    """
    item = visit.item
    rng = stream(seed, "visit", visit.epoch, item.id, visit.repeat, "caption")
    dropout = options.cond_dropout if item.cond_dropout is None else item.cond_dropout
    if rng.random() < dropout:
        return ""
    shuffle = options.shuffle_tags if item.shuffle_tags is None else item.shuffle_tags
    return render(item.caption, rng, shuffle_tags=shuffle, keep_tags=options.keep_tags)
