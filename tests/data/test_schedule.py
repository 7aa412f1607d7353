"""The schedule file: a line a visit, in the order of training, the same bytes anywhere."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.captions import render
from data.item import Bucket, Caption, Item, MicroBatch, Update, Visit
from data.schedule import schedule_lines, write_schedule
from tests.photos import make_photo_folder


def visit(name: str, bucket: Bucket, batch_id: str = "") -> Visit:
    return Visit(Item(name, f"/somewhere/{name}", 9, 9, Caption(name[0]), batch_id=batch_id), bucket, 0, 0)


def test_lines(tmp_path: Path) -> None:
    wide, tall = Bucket(640, 384), Bucket(384, 640)
    updates = (
        Update((MicroBatch(wide, (visit("a.png", wide), visit("b\n.png", wide, "pair"))),)),
        Update((MicroBatch(wide, (visit("c.png", wide),)), MicroBatch(tall, (visit("d.png", tall),)))),
    )
    expected = [
        "update:00012, micro:0, wh:[640, 384], batch_id:, path:a.png, caption:of a\\x1b",
        "update:00012, micro:0, wh:[640, 384], batch_id:pair, path:b\\n.png, caption:of b\\x1b",
        "update:00013, micro:0, wh:[640, 384], batch_id:, path:c.png, caption:of c\\x1b",
        "update:00013, micro:1, wh:[384, 640], batch_id:, path:d.png, caption:of d\\x1b",
    ]

    def caption(visit: Visit) -> str:
        return f"of {render(visit.item.caption, random.Random(0), shuffle_tags=False, keep_tags=0)}\x1b"

    assert list(schedule_lines(updates, caption, first_update=12)) == expected
    path = write_schedule(tmp_path, 3, updates, caption, first_update=12)
    assert path.name == "ep3_batch_schedule.txt"
    assert path.read_bytes() == "".join(f"{line}\n" for line in expected).encode()


# A start of its own for each place, order, hash seed and locale; it prints the schedule of two epochs.
PROGRAM = """
import sys
sys.stdout.reconfigure(encoding="utf-8", newline="\\n")
from data.buckets import compute_buckets, fit_buckets, nearest_bucket
from data.captions import render
from data.plan import plan_epoch, select_rated
from data.schedule import schedule_lines
from data.sources import find_data
from utils.seeding import stream
items = find_data(sys.argv[1]).items
buckets = fit_buckets([(i.width, i.height) for i in items], 192, 16)
print(buckets)
placed = [(i, nearest_bucket(i.width, i.height, buckets)) for i in items]
for epoch in range(2):
    used = select_rated(placed, target_percent=30, seed=7, epoch=epoch, epochs=2)
    plan = plan_epoch(used, batch_size=3, grad_accum=2, seed=7, epoch=epoch)
    def caption(v):
        return render(v.item.caption, stream(7, "visit", epoch, v.item.id, v.repeat), shuffle_tags=True, keep_tags=1)
    for line in schedule_lines(plan, caption):
        print(line)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and a copy of it elsewhere whose entries were made in another order."""
    first = tmp_path_factory.mktemp("first") / "photos"
    make_photo_folder(first)
    for number, path in enumerate(sorted(first.glob("*.png"))):
        path.with_suffix(".yaml").write_text(f"multiply: {number / 3}\nrating: {number + 1}\ntags: [été, straße]\n")
    shutil.copyfile(first / "cat_160x160.webp", first / "große_katze.webp")
    second = tmp_path_factory.mktemp("second") / "deeper" / "copy"
    second.mkdir(parents=True)
    for path in sorted(first.iterdir(), reverse=True):
        shutil.copyfile(path, second / path.name)
    return first, second


def test_same_schedule_anywhere(folders: tuple[Path, Path]) -> None:
    outputs = set()
    for folder, hash_seed, locale in ((folders[0], "0", "C"), (folders[1], "1", "C.utf8"), (folders[1], "77", "POSIX")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "LC_ALL": locale, "PYTHONUTF8": "0"}
        environment["PYTHONCOERCECLOCALE"] = "0"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder)], env=environment, capture_output=True, timeout=60, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    output = outputs.pop()
    assert output.count(b"update:") > 30
    assert "path:große_katze.webp, caption:große".encode() in output
