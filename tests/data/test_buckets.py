"""Buckets: the rule's promises at every resolution, the nearest one, and the fitted ones."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import compute_buckets, crop_loss, fit_buckets, nearest_bucket
from data.item import Bucket

SIZES = st.tuples(st.integers(1, 8000), st.integers(1, 8000))


@pytest.mark.parametrize("step", [8, 16, 32, 64])
def test_rule_holds_at_every_resolution(step: int) -> None:
    for resolution in range(64, 2049, 64):
        buckets = compute_buckets(resolution, step)
        assert 1 <= len(buckets) < 20
        assert len(set(buckets)) == len(buckets)
        assert Bucket(resolution, resolution) in buckets
        for width, height in buckets:
            assert width % step == height % step == 0
            assert 0 < width * height <= resolution**2
            assert 1 / 4 <= width / height <= 4
            assert Bucket(height, width) in buckets


def test_ratios_are_spread_evenly_where_the_step_allows() -> None:
    logs = [math.log(width / height) for width, height in compute_buckets(1024, 8)]
    gaps = [b - a for a, b in itertools.pairwise(logs)]
    assert len(gaps) == 18
    assert max(gaps) < 1.5 * min(gaps)
    assert logs[-1] > math.log(3.5)


def test_common_buckets_at_512() -> None:
    assert {Bucket(512, 512), Bucket(576, 384), Bucket(640, 384), Bucket(384, 576)} <= set(compute_buckets(512, 64))


@settings(deadline=None)
@given(size=SIZES, resolution=st.sampled_from([64, 512, 768]), step=st.sampled_from([8, 64]))
def test_nearest_is_nearest_in_log_ratio(size: tuple[int, int], resolution: int, step: int) -> None:
    buckets = compute_buckets(resolution, step)
    width, height = size

    def distance(bucket: Bucket) -> float:
        return abs(math.log(width / height) - math.log(bucket.width / bucket.height))

    found = nearest_bucket(width, height, buckets)
    assert distance(found) <= min(map(distance, buckets)) + 1e-9
    assert nearest_bucket(width, height, buckets[::-1]) == found
    assert 0 <= crop_loss(width, height, found) < 1


def test_the_edge_is_the_geometric_mean() -> None:
    buckets = compute_buckets(512, 64)
    for narrow, wide in itertools.pairwise(buckets):
        edge = math.sqrt(narrow.width / narrow.height * wide.width / wide.height)
        assert nearest_bucket(round(1e6 * edge * 0.9999), 10**6, buckets) == narrow
        assert nearest_bucket(round(1e6 * edge * 1.0001), 10**6, buckets) == wide


def _mean_loss(sizes: list[tuple[int, int]], buckets: tuple[Bucket, ...]) -> float:
    return sum(crop_loss(*size, nearest_bucket(*size, buckets)) for size in sizes) / len(sizes)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=40), step=st.sampled_from([16, 64]))
def test_fitted_buckets_lose_no_more_and_ignore_order(sizes: list[tuple[int, int]], step: int) -> None:
    computed, fitted = compute_buckets(512, step), fit_buckets(sizes, 512, step)
    assert len(fitted) <= len(computed)
    assert all(w % step == h % step == 0 and w * h <= 512**2 for w, h in fitted)
    # The price of small areas may move a bucket by a hair.
    assert _mean_loss(sizes, fitted) <= _mean_loss(sizes, computed) + 0.1
    shuffled = sizes[:]
    random.Random(1).shuffle(shuffled)
    assert fit_buckets(shuffled, 512, step) == fitted


def test_no_images_give_the_computed_buckets() -> None:
    assert fit_buckets([], 512, 64) == compute_buckets(512, 64)
