"""What training throws away of photographs as they come: no image, no repetition, little area."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data.buckets import compute_buckets, crop_loss, fit_buckets, nearest_bucket
from data.item import Bucket, Caption, Item
from data.plan import Placed, plan_epoch

# Cameras and telephones: three to two, four to three, sixteen to nine, squares; upright as often as lying.
CAMERAS = [(6000, 4000), (4032, 3024), (3840, 2160), (3000, 3000), (4000, 3000), (2560, 1440), (1350, 1080)]


def photographs(count: int) -> list[tuple[int, int]]:
    """Sizes of which 8 % are free crops."""
    chance = random.Random(count)
    sizes = []
    for _ in range(count):
        width, height = chance.choice(CAMERAS)
        if chance.random() < 0.08:
            width, height = int(width * chance.uniform(0.4, 1)), int(height * chance.uniform(0.4, 1))
        sizes.append((height, width) if chance.random() < 0.5 else (width, height))
    return sizes


def placed(sizes: list[tuple[int, int]], buckets: tuple[Bucket, ...]) -> list[Placed]:
    return [
        (Item(f"{number:05}", "", *size, Caption("")), nearest_bucket(*size, buckets))
        for number, size in enumerate(sizes)
    ]


def loss(items: list[Placed]) -> float:
    return sum(crop_loss(item.width, item.height, bucket) for item, bucket in items) / len(items)


@pytest.mark.parametrize("count", [100, 500, 2000])
@pytest.mark.parametrize("resolution", [512, 1024])
@pytest.mark.parametrize("batch_size", [4, 8])
def test_nothing_is_dropped_repeated_or_underfull(count: int, resolution: int, batch_size: int) -> None:
    items = placed(photographs(count), compute_buckets(resolution, 64))
    updates = plan_epoch(items, batch_size=batch_size, grad_accum=1, seed=1, epoch=0)
    uses = Counter(v.item.id for u in updates for m in u.micro_batches for v in m.visits)
    assert len(uses) == count
    assert set(uses.values()) == {1}
    full = -(-count // len(updates))
    assert full <= batch_size
    assert [update.images for update in updates if update.images < full - 1] == []
    used = {bucket for _, bucket in items}
    assert sum(len(update.micro_batches) for update in updates) - len(updates) <= len(used) - 1


@pytest.mark.parametrize("count", [100, 500, 2000])
def test_little_area_is_cropped(count: int) -> None:
    sizes = photographs(count)
    computed, fitted = compute_buckets(512, 64), fit_buckets(sizes, 512, 8)
    assert len(computed) < 20
    assert len(fitted) < 20
    assert loss(placed(sizes, computed)) <= 0.05
    assert loss(placed(sizes, fitted)) <= 0.015
