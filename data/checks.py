"""Looking at every picture as a whole: does it decode, and is it there twice?"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.headers import PictureError, read_header
from data.index import Index, Stamp
from data.item import Bucket, Item
from data.settings import Unreadable
from utils.progress import counted

_BLOCK = 1 << 20
_START = 1 << 14


class Memory:
    """What was found out about whole files, by path; a file that has changed since is unknown."""

    def __init__(self, path: Path | None) -> None:
        """`path`: the file that keeps it for the next start; `None` keeps nothing."""
        self._index = None if path is None else Index(path)

    def recall(self, path: str) -> str | None:
        """What is known of the file."""
        stamp = None if self._index is None else _stamp(path)
        if self._index is None or stamp is None:
            return None
        known = self._index.known(*os.path.split(path), stamp)
        return known[0] if known is not None and isinstance(known[0], str) else None

    def learn(self, path: str, fact: str) -> None:
        """Remember the fact of the file."""
        stamp = None if self._index is None else _stamp(path)
        if self._index is not None and stamp is not None:
            self._index.learn(*os.path.split(path), stamp, [fact])

    def save(self) -> None:
        """Keep it for the next start."""
        if self._index is not None:
            self._index.save()


def check_pictures(items: Sequence[Item], *, workers: int, memory: Memory | None = None) -> tuple[Unreadable, ...]:
    """The pictures that cannot be decoded, each with its reason.

    Every one that `memory` does not know is decoded once, at full size.
    """
    memory = Memory(None) if memory is None else memory
    reasons: dict[str, str] = {}
    for item in items:
        known = memory.recall(item.path)
        if known is not None:
            reasons[item.path] = known
    new = list(dict.fromkeys(item.path for item in items if item.path not in reasons))
    with ThreadPoolExecutor(max(1, workers)) as pool, counted("pictures decoded", len(new)) as progress:
        for path, reason in zip(new, pool.map(_reason, new), strict=True):
            reasons[path] = reason
            memory.learn(path, reason)
            progress(1)
    memory.save()
    return tuple(Unreadable(item.path, reasons[item.path]) for item in items if reasons[item.path])


def _reason(path: str) -> str:
    """Why the picture cannot be decoded; empty if it can."""
    from data.pixels import Crop, decode

    try:
        header = read_header(path)
        decode(path, header, Crop(0.0, 0.0, 1.0, 1.0, False), Bucket(header.width, header.height))
    except PictureError as error:
        return str(error)
    return ""


def find_duplicates(
    items: Iterable[Item], sizes: Mapping[str, int] | None = None, *, memory: Memory | None = None
) -> tuple[tuple[Item, ...], ...]:
    """Groups of items whose files hold the same bytes, in the order of the items.

    Only files of equal size are read, and whole only when they begin alike and `memory` does not know them.

    Args:
        sizes: bytes by path, as far as they are known; the others are asked for.
    """
    memory = Memory(None) if memory is None else memory
    known_sizes = {} if sizes is None else sizes

    def size(path: str) -> int:
        known = known_sizes.get(path)
        return Path(path).stat().st_size if known is None else known

    def content(path: str) -> str:
        known = memory.recall(path)
        if known is None:
            known = _content(path)
            memory.learn(path, known)
        return known

    # A file that is listed twice is one file; groups stay in the order in which their first item was seen.
    once: dict[str, Item] = {}
    for item in items:
        once.setdefault(item.path, item)
    groups = [list(once.values())]
    for key in (size, _start, content):
        groups = [group for whole in groups for group in _split(whole, key) if len(group) > 1]
    memory.save()
    place = {path: number for number, path in enumerate(once)}
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


def _start(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.blake2b(file.read(_START), digest_size=16).digest()


def _content(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: str) -> Stamp | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None  # decoding will name the file and the reason
    return Stamp(status.st_size, status.st_mtime_ns)
