"""From micro-batches to tensors, in worker processes: pixels, captions and every random draw of the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.captions import render
from data.item import MicroBatch, Update, Visit
from data.pixels import load_pixels
from utils.config import DataOptions
from utils.seeding import stream, tensor_stream
from utils.stopping import ignore_in_worker, workers_start


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
    """

    visits: tuple[Visit, ...]
    pixels: torch.Tensor
    captions: tuple[str, ...]
    draws: Any
    loss_scale: torch.Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.visits,
            self.pixels.to(device, non_blocking=non_blocking),
            self.captions,
            self.draws.to(device, non_blocking=non_blocking),
            self.loss_scale.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where it reaches a GPU without waiting."""
        pixels, scale = self.pixels.pin_memory(), self.loss_scale.pin_memory()
        return Batch(self.visits, pixels, self.captions, self.draws.pin_memory(), scale)


class BatchSource(Dataset[Batch]):
    """Makes the batch for a request; workers hold nothing else than these options and the drawer."""

    def __init__(self, options: DataOptions, seed: int, draw: Callable[[Request], Movable]) -> None:
        self.options, self.seed, self.draw = options, seed, draw

    def __getitem__(self, request: Request) -> Batch:
        visits = request.visits
        return Batch(
            visits=visits,
            pixels=torch.stack([self._pixels(visit) for visit in visits]),
            captions=tuple(caption_of(visit, self.options, self.seed) for visit in visits),
            draws=self.draw(request),
            loss_scale=torch.tensor([visit.item.loss_scale for visit in visits]),
        )

    def _pixels(self, visit: Visit) -> torch.Tensor:
        item = visit.item
        flip_p = self.options.flip_p if item.flip_p is None else item.flip_p
        rng = stream(self.seed, "visit", visit.epoch, item.id, visit.repeat, "pixels")
        return load_pixels(item, visit.bucket, rng=rng, flip_p=flip_p, crop_jitter=self.options.crop_jitter)


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


class _Queue(Sampler[Request]):
    """The requests of the coming epoch."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class Batches:
    """The batches of one epoch after another, from workers that live as long as the run."""

    def __init__(
        self, options: DataOptions, seed: int, draw: Callable[[Request], Movable], *, pin_memory: bool = False
    ) -> None:
        self._queue = _Queue()
        workers = options.num_workers
        start = None if workers == 0 or options.worker_start == "auto" else options.worker_start
        self._loader: DataLoader[Batch] = DataLoader(
            BatchSource(options, seed, draw),
            batch_size=None,
            sampler=self._queue,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_in_worker if workers else None,
            multiprocessing_context=start,
            pin_memory=pin_memory,
            # Without its own generator, iter(DataLoader) would draw from torch's global one.
            generator=tensor_stream(seed, "workers"),
        )

    def epoch(self, updates: Sequence[Update], done: int = 0) -> Iterator[Batch]:
        """A batch for each micro-batch of an epoch's `updates`, in order, without the first `done` updates."""
        self._queue.requests = requests(updates, done)
        with workers_start():
            return iter(self._loader)


def requests(updates: Sequence[Update], done: int = 0) -> list[Request]:
    """What to ask the workers for, a request a micro-batch, once `done` updates of the epoch are trained."""
    asked = []
    for number, update in enumerate(updates[done:], start=done):
        first = 0
        for micro_batch in update.micro_batches:
            asked.append(Request(micro_batch, number, first, update.images))
            first += len(micro_batch.visits)
    return asked
