"""The sizes that images are cut to: computed by rule, or fitted to a data set."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from data.item import Bucket

MAX_RATIO = 4.0
MAX_BUCKETS = 19

# What a bucket costs for being smaller than it may be, in units of cropped area: enough to settle ties in favour
# of pixels, too little to make up for a crop that anybody would see.
_AREA_PRICE = 0.1


def compute_buckets(resolution: int, step: int) -> tuple[Bucket, ...]:
    """The buckets of `resolution`, fewer than twenty, from the tallest to the widest.

    Sides are multiples of `step`, areas at most `resolution` squared, every bucket has its mirror, and the aspect
    ratios stand evenly in log scale between 1:4 and 4:1 as far as the step allows: they are the choice that loses
    least when all ratios up to 4:1 are equally common.
    """
    ratios = np.exp(np.linspace(0.0, math.log(MAX_RATIO), 512))
    wide = [bucket for bucket in _candidates(resolution, step) if bucket.width >= bucket.height]
    chosen = _choose(wide, ratios, (MAX_BUCKETS + 1) // 2, resolution, square=True)
    return _sorted({*chosen, *(Bucket(height, width) for width, height in chosen)})


def fit_buckets(sizes: Iterable[tuple[int, int]], resolution: int, step: int) -> tuple[Bucket, ...]:
    """At most as many buckets as `compute_buckets` gives, chosen to crop the least off images of these `sizes`.

    A pure function of the set of sizes: their order does not matter, and equal data gives equal buckets.
    """
    ratios = np.sort(np.array([width / height for width, height in sizes], dtype=np.float64))
    if not len(ratios):
        return compute_buckets(resolution, step)
    count = len(compute_buckets(resolution, step))
    return _sorted(_choose(_candidates(resolution, step), ratios, count, resolution, square=False))


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in log aspect ratio to an image of this size."""
    ordered, edges = _edges(tuple(buckets))
    ratio = width / height
    return ordered[bisect_right(edges, ratio * ratio)]


def crop_loss(width: int, height: int, bucket: Bucket) -> float:
    """The share of the image's area that falls to the bucket's aspect ratio, 0 to 1."""
    fit = (width * bucket.height) / (height * bucket.width)
    return 1.0 - min(fit, 1.0 / fit)


@lru_cache(maxsize=64)
def _edges(buckets: tuple[Bucket, ...]) -> tuple[tuple[Bucket, ...], list[float]]:
    # Half-way in log scale is the geometric mean; its square needs no root and no logarithm, so the answer is the
    # same on every machine.
    ordered = _sorted(buckets)
    edges = [(a.width * b.width) / (a.height * b.height) for a, b in pairwise(ordered)]
    return ordered, edges


def _sorted(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    return tuple(sorted(buckets, key=lambda bucket: (bucket.width / bucket.height, bucket.width)))


def _candidates(resolution: int, step: int) -> tuple[Bucket, ...]:
    """Every bucket worth having: for each longer side the two largest shorter sides that fit, and the mirrors.

    The second largest is there for coarse steps: 576 x 384 is 3:2, and nothing larger under 512 squared is.
    """
    area = resolution * resolution
    best: dict[tuple[int, int], Bucket] = {}
    for long in range(step, int(math.sqrt(area * MAX_RATIO)) + 1, step):
        largest = min(area // long // step * step, long)
        for short in (largest, largest - step):
            if short <= 0 or long > MAX_RATIO * short or (long + step) * (short + step) <= area:
                continue
            for bucket in (Bucket(long, short), Bucket(short, long)):
                divisor = math.gcd(*bucket)
                ratio = (bucket.width // divisor, bucket.height // divisor)
                best[ratio] = max(best.get(ratio, bucket), bucket)
    return _sorted(best.values())


def _choose(
    candidates: Sequence[Bucket], ratios: np.ndarray[Any, Any], count: int, resolution: int, *, square: bool
) -> list[Bucket]:
    """The `count` candidates (sorted by ratio) that lose the least on `ratios` (sorted): shortest path, exact.

    `square`: the first candidate must be among them.
    """
    between, before, after = _losses(candidates, ratios, resolution)
    layers = min(count, len(candidates))
    cost = before.copy()
    if square:
        cost[1:] = np.inf
    parents: list[np.ndarray[Any, Any]] = []
    for _ in range(layers - 1):
        paths = cost[:, None] + between
        parents.append(paths.argmin(axis=0))
        cost = paths.min(axis=0)
    index = int((cost + after).argmin())
    chosen = [candidates[index]]
    for parent in reversed(parents):
        index = int(parent[index])
        chosen.append(candidates[index])
    return chosen


def _losses(
    candidates: Sequence[Bucket], ratios: np.ndarray[Any, Any], resolution: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What all images between two neighbouring buckets lose, and those before the first and after the last.

    An image of ratio r loses 1 - r / b in a wider bucket b, and 1 - b / r in a narrower one: with running sums of r
    and 1 / r every pair is answered at once.
    """
    wanted = np.array([bucket.width / bucket.height for bucket in candidates])
    price = _AREA_PRICE * (1.0 - np.array([b.width * b.height for b in candidates]) / resolution**2)
    sum_ratio = np.concatenate([[0.0], np.cumsum(ratios)])
    sum_inverse = np.concatenate([[0.0], np.cumsum(1.0 / ratios)])
    here = np.searchsorted(ratios, wanted)
    edge = np.searchsorted(ratios, np.sqrt(wanted[:, None] * wanted[None, :]))

    def narrower(bucket: Any, start: Any, stop: Any) -> Any:
        return (1.0 + price[bucket]) * (stop - start) - wanted[bucket] * (sum_inverse[stop] - sum_inverse[start])

    def wider(bucket: Any, start: Any, stop: Any) -> Any:
        return (1.0 + price[bucket]) * (stop - start) - (sum_ratio[stop] - sum_ratio[start]) / wanted[bucket]

    every = np.arange(len(candidates))
    left, right = every[:, None], every[None, :]
    between = narrower(left, here[:, None], edge) + wider(right, edge, here[None, :])
    between[left >= right] = np.inf
    nothing = np.zeros_like(here)
    return between, wider(every, nothing, here), narrower(every, here, nothing + len(ratios))
