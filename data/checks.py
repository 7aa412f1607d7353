"""Looking at every picture as a whole: does it decode, and is it there twice?"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.headers import PictureError, read_header
from data.item import Bucket, Item
from data.settings import Unreadable

_BLOCK = 1 << 20
_START = 1 << 16


def check_pictures(
    items: Sequence[Item], *, workers: int, progress: Callable[[int], None] | None = None
) -> tuple[Unreadable, ...]:
    """The pictures that cannot be decoded, each with its reason; every one is decoded once, at full size."""
    from data.pixels import Crop, decode

    def look(item: Item) -> Unreadable | None:
        try:
            header = read_header(item.path)
            decode(item.path, header, Crop(0.0, 0.0, 1.0, 1.0, False), Bucket(header.width, header.height))
        except PictureError as error:
            return Unreadable(item.path, str(error))
        return None

    broken = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for outcome in pool.map(look, items):
            if progress is not None:
                progress(1)
            if outcome is not None:
                broken.append(outcome)
    return tuple(broken)


def find_duplicates(items: Sequence[Item]) -> tuple[tuple[Item, ...], ...]:
    """Groups of items whose files hold the same bytes, in the order of the items.

    Only files of equal size are read, and whole only when they begin alike.
    """
    # A file that is listed twice is one file; groups stay in the order in which their first item was seen.
    once = {item.path: item for item in reversed(items)}
    groups = [list(reversed(once.values()))]
    for key in (_size, _start, _content):
        groups = [group for whole in groups for group in _split(whole, key) if len(group) > 1]
    place = {path: number for number, path in enumerate(reversed(once))}
    return tuple(tuple(group) for group in sorted(groups, key=lambda group: place[group[0].path]))


def _split(items: list[Item], key: Callable[[str], object]) -> list[list[Item]]:
    """The items by the key of their file; those whose file has gone are left out."""
    groups: dict[object, list[Item]] = defaultdict(list)
    for item in items:
        try:
            groups[key(item.path)].append(item)
        except OSError:
            continue
    return list(groups.values())


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _start(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.blake2b(file.read(_START), digest_size=16).digest()


def _content(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
