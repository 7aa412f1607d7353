"""Substitutes for broken pictures: the same ones everywhere, and an end when there are too many."""

from __future__ import annotations

import pytest

from data.item import Bucket, Caption, Item, Visit
from data.substitutes import Failures, pools, substitutes
from utils.errors import UserError

WIDE, TALL = Bucket(640, 384), Bucket(384, 640)


def item(name: str) -> Item:
    return Item(name, f"/data/{name}", 9, 9, Caption(name))


ITEMS = [(item(f"{number:02}.jpg"), WIDE if number % 2 else TALL) for number in range(40)]


def test_pools_hold_each_bucket_whatever_the_order() -> None:
    assert pools(ITEMS) == pools(ITEMS[::-1])
    assert {bucket: len(items) for bucket, items in pools(ITEMS).items()} == {WIDE: 20, TALL: 20}


def test_others_of_the_same_bucket_with_draws_of_their_own() -> None:
    pool = pools(ITEMS)[WIDE]
    broken = Visit(pool[3], WIDE, 2, 0)
    first, second = list(substitutes(broken, pool, seed=1)), list(substitutes(broken, pool, seed=1))
    assert first == second
    assert len(first) == len({visit.item.id for visit in first}) == 8
    assert all(visit.item != broken.item and visit.item in pool for visit in first)
    assert all(visit.bucket == WIDE and visit.epoch == 2 and visit.repeat >= 1_000_000 for visit in first)
    again = list(substitutes(Visit(pool[3], WIDE, 2, 1), pool, seed=1))
    assert not {(v.item.id, v.repeat) for v in first} & {(v.item.id, v.repeat) for v in again}
    assert next(substitutes(Visit(pool[3], WIDE, 3, 0), pool, seed=1)).item != first[0].item


def test_alone_in_its_bucket() -> None:
    assert list(substitutes(Visit(ITEMS[0][0], TALL, 0, 0), [ITEMS[0][0]], seed=1)) == []


def test_each_broken_picture_is_named_once_an_epoch_and_too_many_end_the_run() -> None:
    failures = Failures()
    line = failures.add(Visit(item("a\n.jpg"), WIDE, 0, 0), "cannot be decoded", 300)
    assert line is not None
    assert line.startswith("/data/a\\n.jpg: cannot be decoded")
    assert failures.add(Visit(item("a\n.jpg"), WIDE, 0, 1), "cannot be decoded", 300) is None
    for number in range(2):
        assert failures.add(Visit(item(f"{number}.jpg"), WIDE, 0, 0), "broken", 300) is not None
    with pytest.raises(
        UserError, match=r"(?s)4 pictures of epoch 0 .*a\\n.jpg: cannot be decoded.*last.jpg: broken"
    ) as end:
        failures.add(Visit(item("last.jpg"), WIDE, 0, 0), "broken", 300)
    assert end.value.exit_code == 2


def test_a_new_epoch_counts_anew_and_one_picture_never_ends_a_run() -> None:
    failures = Failures()
    for epoch in range(5):
        assert failures.add(Visit(item(f"{epoch}.jpg"), WIDE, epoch, 0), "broken", 10) is not None
