"""Every kind of file comes to its end: pixels as they should be, or a reason; never a crash or a hang."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data.folder import Found
from data.headers import PictureError
from data.item import Bucket, Caption, Item
from data.pixels import load_pixels
from data.sources import find_data
from tests.data.corpus import BROKEN, GOOD, HEIGHT, JUNK, WIDTH, Kind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="file names and pipes of Unix")


@contextmanager
def five_seconds() -> Iterator[None]:
    """No file may hold the program for longer."""

    def bark(_number: int, _frame: object) -> None:
        raise TimeoutError("a file held the program for five seconds")

    old = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    with five_seconds():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for kind in (*GOOD, *BROKEN, *JUNK):
        kind.write(root / kind.name)
    (root / "loop").symlink_to(root)
    (root / "folder.jpg").mkdir()
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    with five_seconds():
        return find_data([folder])


def test_there_are_enough_kinds() -> None:
    assert len({kind.name for kind in (*GOOD, *BROKEN, *JUNK)}) >= 45


def test_everything_is_accounted_for(found: Found) -> None:
    assert {item.id for item in found.items} == {k.name for k in GOOD} | {k.name for k in BROKEN if k.late}
    assert {Path(picture.path).name for picture in found.unreadable} == {k.name for k in BROKEN if not k.late}


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: ascii(kind.name))
def test_good(kind: Kind, found: Found) -> None:
    (item,) = [item for item in found.items if item.id == kind.name]
    assert (item.width, item.height) == (WIDTH, HEIGHT)
    pixels = load_pixels(item, Bucket(WIDTH, HEIGHT), rng=None, flip_p=1.0, crop_jitter=0.02)
    assert kind.pixels is not None
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(float) - kind.pixels.astype(float))
    assert difference.mean() <= kind.tolerance


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.name)
def test_broken(kind: Kind, folder: Path, found: Found) -> None:
    if kind.late:
        item = Item(kind.name, str(folder / kind.name), WIDTH, HEIGHT, Caption(""))
        with pytest.raises(PictureError, match=kind.reason):
            load_pixels(item, Bucket(WIDTH, HEIGHT), rng=None, flip_p=0.0, crop_jitter=0.0)
    else:
        (picture,) = [picture for picture in found.unreadable if Path(picture.path).name == kind.name]
        assert kind.reason in picture.reason
        assert picture.reason
