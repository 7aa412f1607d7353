"""The data in words: every number that is said is the number that is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.advice import advice, shape_name
from data.buckets import compute_buckets, nearest_bucket
from data.folder import Found
from data.item import Bucket, Caption, Item
from data.lengths import CutCaption
from data.plan import Placed, count_updates, plan_epoch
from data.report import Report, bucket_uses, describe_data, write_report
from data.settings import Note, Unreadable


def item(name: str, width: int, height: int, caption: str = "a cat") -> Item:
    return Item(name, f"/data/{name}", width, height, Caption(caption))


def place(items: list[Item], resolution: int = 512) -> list[Placed]:
    buckets = compute_buckets(resolution, 64)
    return [(item, nearest_bucket(item.width, item.height, buckets)) for item in items]


ITEMS = [
    *(item(f"wide{number}.jpg", 6000, 4000) for number in range(5)),
    *(item(f"small{number}.jpg", 300, 300) for number in range(3)),
    item("mute\n.jpg", 4000, 6000, ""),
]


def report(items: list[Item], batch_size: int = 2, epochs: int = 3, total: int = 15) -> Report:
    placed = place(items)
    found = Found(
        tuple(items),
        tuple(Unreadable(f"/data/bad{number}.jpg", "the file is empty") for number in range(7)),
        (Note("/data/x.yaml", "unknown key"),),
    )
    return describe_data(
        found,
        placed,
        plan_epoch(placed, batch_size=batch_size, grad_accum=1, seed=1, epoch=0),
        count_updates(placed, batch_size=batch_size, grad_accum=1, seed=1, epochs=epochs),
        batch_size=batch_size,
        total=total,
        cut=[CutCaption(items[0], 80, "old red barn")],
        duplicates=[items[:2]],
    )


def test_everything_is_said() -> None:
    text = "\n".join(report(ITEMS).lines)
    for words in (
        "data: 9 pictures, 9 to train on",
        "7 pictures left out (unreadable_images.txt):",
        "/data/bad0.jpg: the file is empty",
        "... and 2 more",
        "3 pictures smaller than the bucket, enlarged (undersized_images.txt):",
        "/data/small0.jpg: 300 x 300 for 512 x 512",
        "1 caption empty (empty_captions.txt):",
        "/data/mute\\n.jpg",
        "80 tokens, lost: old red barn",
        "/data/wide0.jpg = /data/wide1.jpg",
        "/data/x.yaml: unknown key",
        "buckets: 3 in use",
        "5 pictures,   0.0 % cropped",
        "3 pictures,   0.0 % cropped, 3 enlarged",
        "epoch: 9 visits, 5 updates, micro-batches of up to 2",
        "run: 3 epochs, 15 updates",
    ):
        assert words in text
    assert all(line.isprintable() for line in report(ITEMS).lines)


def test_a_run_that_ends_early_says_so() -> None:
    assert "run: 2 epochs, 7 updates" in report(ITEMS, total=7).lines


def test_what_is_not_there_is_not_mentioned() -> None:
    placed = place(ITEMS[:5])
    found = Found(tuple(ITEMS[:5]), (), ())
    plan = plan_epoch(placed, batch_size=2, grad_accum=1, seed=1, epoch=0)
    clean = describe_data(found, placed, plan, [3], batch_size=2, total=3)
    assert clean.files == {}
    assert not any(word in "\n".join(clean.lines) for word in ("left out", "enlarged", "empty", "advice"))


def test_files_hold_all_of_it(tmp_path: Path) -> None:
    write_report(report(ITEMS), tmp_path)
    assert len((tmp_path / "unreadable_images.txt").read_text().splitlines()) == 7
    assert len((tmp_path / "undersized_images.txt").read_text().splitlines()) == 3
    assert (tmp_path / "empty_captions.txt").read_text() == "/data/mute\\n.jpg\n"
    assert (tmp_path / "data_report.txt").read_text().splitlines() == list(report(ITEMS).lines)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_uses_add_up(batch_size: int) -> None:
    placed = place([*ITEMS, *(item(f"tall{number}", 900, 1600) for number in range(8))])
    plan = plan_epoch(placed, batch_size=batch_size, grad_accum=2, seed=1, epoch=0)
    uses = bucket_uses(placed, plan, batch_size)
    assert sum(use.images for use in uses) == sum(use.visits for use in uses) == len(placed)
    needed = sum(-(-update.images // batch_size) for update in plan)
    assert sum(use.extra for use in uses) == sum(len(update.micro_batches) for update in plan) - needed


def test_advice() -> None:
    panoramas = [item(f"{number}", 5000, 500) for number in range(12)]
    cinema = [item(f"c{number}", 2100, 900) for number in range(12)]
    placed = [*place(panoramas), *((one, Bucket(640, 384)) for one in cinema)]
    plan = plan_epoch(placed, batch_size=2, grad_accum=1, seed=1, epoch=0)
    text = " ".join(advice(placed, bucket_uses(placed, plan, 2), [12]))
    assert "12 pictures are longer than 4:1" in text
    one = [place(panoramas[:1])[0], (cinema[0], Bucket(640, 384))]
    alone = " ".join(
        advice(one, bucket_uses(one, plan_epoch(one, batch_size=2, grad_accum=1, seed=1, epoch=0), 2), [2])
    )
    assert "1 picture is longer than 4:1 and loses its ends" in alone
    assert "1 picture of about 21:9 loses" in alone
    assert "12 pictures of about 21:9 lose 29 % in 640 x 384" in text
    enlarged = place([item("a", 300, 300), item("b", 4000, 4000)])
    plan = plan_epoch(enlarged, batch_size=2, grad_accum=1, seed=1, epoch=0)
    text = " ".join(advice(enlarged, bucket_uses(enlarged, plan, 2), [1]))
    assert "50 % of the pictures are enlarged" in text
    assert "a single update" in text


@pytest.mark.parametrize(
    ("size", "name"), [((1, 1), "1:1"), ((900, 1600), "16:9"), ((3000, 2000), "3:2"), ((21, 9), "21:9")]
)
def test_shapes_have_names(size: tuple[int, int], name: str) -> None:
    assert shape_name(*size) == name
