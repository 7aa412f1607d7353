"""The validation pass: fixed images, centre crops, noise and timesteps, so that a curve moves with the weights only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data.captions import render
from data.headers import PictureError
from data.item import Bucket, Item
from data.pixels import load_pixels
from data.turning import Turning
from data.validation import WatchedSet
from data.validation_file import COMBINED, VALIDATION
from utils.logs import LOGGER
from utils.seeding import stream, tensor_stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BANDS = 4
ENOUGH_PROBES = 128
MOST_PER_IMAGE = 4
MSE, CONFIGURED = "mse", "configured"


@dataclass(slots=True)
class Probe:
    """Watched images of one bucket, each at one timestep.

    Args:
        latents: mean of the VAE's distribution, not scaled, float32 (B, C, h, w).
        timesteps: int64 (B,).
        noise: unit normal, float32 (B, C, h, w).
    """

    latents: Tensor
    captions: tuple[str, ...]
    timesteps: Tensor
    noise: Tensor


LossOf = Callable[[Probe], Mapping[str, "Tensor"]]
Encode = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Point:
    """One timestep of one image: `turn` counts those of the image from 0."""

    place: int
    turn: int
    timestep: int


@dataclass(slots=True)
class _Watched:
    name: str
    trained: bool
    items: tuple[Item, ...]
    latents: list[Tensor] = field(default_factory=list)
    points: tuple[Point, ...] = ()


@dataclass(slots=True)
class Validation:
    """The passes of a run over its watched sets.

    Args:
        bucket_of: the size an image is cut to.
        encode: uint8 pixels (1, 3, H, W) to the mean of the VAE's distribution, unscaled, float32 (1, C, h, w).
        timesteps: the trained range, from and below.
        seed: of noise and timesteps; the file's, so that it does not move with the run's.
    """

    sets: Sequence[WatchedSet]
    bucket_of: Callable[[Item], Bucket]
    encode: Encode
    timesteps: tuple[int, int]
    seed: int
    batch_size: int
    relative: bool = False
    keep_tags: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    turning: Turning = field(default_factory=Turning)
    _watched: list[_Watched] = field(default_factory=list)

    def run(self, update: int, loss_of: LossOf, *, label: str = "") -> dict[str, float]:
        """The scalars of the pass after `update`, by tag; `label` is added to their names ("ema").

        When the curve of the plain weights has turned up, the log says so.

        `loss_of` gives for a probe the losses (B,) of its images: "mse", plain, and "configured", as the training
        weighs them. Call it inside `utils.borrow.undisturbed`.
        """
        if not self._watched:
            self._watched = [self._prepare(watched) for watched in self.sets]
        scalars: dict[str, float] = {}
        together: list[float] = []
        held_out = [watched for watched in self._watched if not watched.trained]
        for watched in self._watched:
            losses = self._losses(watched, loss_of)
            scalars |= self._scalars(watched, losses, label)
            means = _image_means(losses[MSE], watched.points, len(watched.items))
            together += [] if watched.trained else means
            hint = self.turning.observe(update, means) if watched.name == VALIDATION and not label else None
            if hint is not None:
                LOGGER.info("%s", hint)
        if len(held_out) > 1:
            scalars[_tag("loss", COMBINED, label)] = _mean(together)
        return scalars

    def _prepare(self, watched: WatchedSet) -> _Watched:
        """Decode and encode once: the VAE is not trained, so its latents stay what they are."""
        items, latents = [], []
        for item in watched.items:
            try:
                pixels = load_pixels(item, self.bucket_of(item), rng=None, flip_p=0.0, crop_jitter=0.0)
            except PictureError as error:
                LOGGER.warning("validation goes on without %s: %s", item.path, str(error))
                continue
            items.append(item)
            # One by one, so that neither the batch size nor its neighbours change a latent.
            latents.append(self.encode(pixels[None])[0].float().cpu())
        points = probe_points([item.id for item in items], self.timesteps, self.seed)
        return _Watched(watched.name, watched.trained, tuple(items), latents, points)

    def _losses(self, watched: _Watched, loss_of: LossOf) -> dict[str, list[float]]:
        """The losses of every point of `watched`, in the order of its points."""
        import torch

        found: list[tuple[list[int], Mapping[str, Tensor]]] = []
        for rows in self._micro_batches(watched):
            # The last one of a size is filled up: every call has the shape, and so the rounding, of all others.
            full = (rows * self.batch_size)[: self.batch_size]
            answer = loss_of(self._probe(watched, full))
            found.append((rows, {name: values[: len(rows)] for name, values in answer.items()}))
        losses: dict[str, list[float]] = {}
        for name in found[0][1] if found else (MSE,):
            values = torch.cat([answer[name].detach().float().cpu() for _, answer in found]).tolist() if found else []
            order = [row for rows, _ in found for row in rows]
            losses[name] = [value for _, value in sorted(zip(order, values, strict=True))]
        return losses

    def _micro_batches(self, watched: _Watched) -> Iterator[list[int]]:
        """Points of one size of latents, `batch_size` at most."""
        by_shape: dict[torch.Size, list[int]] = {}
        for row, point in enumerate(watched.points):
            by_shape.setdefault(watched.latents[point.place].shape, []).append(row)
        for rows in by_shape.values():
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _probe(self, watched: _Watched, rows: Sequence[int]) -> Probe:
        import torch

        points = [watched.points[row] for row in rows]
        items = [watched.items[point.place] for point in points]
        latents = torch.stack([watched.latents[point.place] for point in points])
        noise = [
            torch.randn(latents.shape[1:], generator=tensor_stream(self.seed, "probe", item.id, point.turn))
            for item, point in zip(items, points, strict=True)
        ]
        return Probe(
            latents=latents,
            captions=tuple(self._caption(item) for item in items),
            timesteps=torch.tensor([point.timestep for point in points], dtype=torch.int64),
            noise=torch.stack(noise),
        )

    def _caption(self, item: Item) -> str:
        chance = stream(self.seed, "probe caption", item.id)
        return render(item.caption, chance, shuffle_tags=False, keep_tags=self.keep_tags)

    def _scalars(self, watched: _Watched, losses: Mapping[str, list[float]], label: str) -> dict[str, float]:
        name, count = watched.name, len(watched.items)
        mse = _mean(_image_means(losses[MSE], watched.points, count))
        scalars = {_tag("loss", name, label): mse}
        if CONFIGURED in losses:
            configured = _mean(_image_means(losses[CONFIGURED], watched.points, count))
            scalars[_tag("validation", f"{name} configured", label)] = configured
        for band, (low, high) in enumerate(bands(*self.timesteps)):
            inside = [
                loss for loss, point in zip(losses[MSE], watched.points, strict=True) if low <= point.timestep < high
            ]
            if inside:
                scalars[_tag("validation", f"{name} band {band + 1} t{low:03}-{high - 1:03}", label)] = _mean(inside)
        if self.relative:
            first = self.baseline.setdefault(f"{name} {label}".rstrip(), mse)
            scalars[_tag("validation", f"{name} relative", label)] = mse / first
        return scalars

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know: plain JSON values."""
        return {"baseline": dict(self.baseline), "turning": self.turning.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.baseline = dict(state["baseline"])
        self.turning.load_state(state["turning"])


def probe_points(ids: Sequence[str], timesteps: tuple[int, int], seed: int) -> tuple[Point, ...]:
    """The timesteps at which each image is watched: a fixed grid, evenly over the range, dealt out to the images.

    Few images get several timesteps each, one from each part of the range; with many, one each is enough. The grid
    has no chance in it; only which image gets which place of it is drawn, from the ids.
    """
    start, end = timesteps
    each = max(1, min(MOST_PER_IMAGE, round(ENOUGH_PROBES / max(1, len(ids))), end - start))
    total = each * len(ids)
    points = []
    for turn in range(each):
        order = list(range(len(ids)))
        stream(seed, "probe timesteps", turn, *sorted(ids)).shuffle(order)
        for rank, place in enumerate(order):
            middle = (2 * (turn * len(ids) + rank) + 1) * (end - start) // (2 * total)
            points.append(Point(place, turn, start + middle))
    return tuple(sorted(points, key=lambda point: (point.place, point.turn)))


def bands(start: int, end: int) -> list[tuple[int, int]]:
    """The range of timesteps in equal parts, from and below: what is learned of outlines and of details differs."""
    edges = [start + (end - start) * band // BANDS for band in range(BANDS + 1)]
    return [(low, high) for low, high in pairwise(edges) if high > low]


def _tag(group: str, name: str, label: str) -> str:
    return f"{group}/{name} {label}".rstrip()


def _image_means(losses: Sequence[float], points: Sequence[Point], count: int) -> list[float]:
    sums, counts = [0.0] * count, [0] * count
    for loss, point in zip(losses, points, strict=True):
        sums[point.place] += loss
        counts[point.place] += 1
    return [total / number for total, number in zip(sums, counts, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
