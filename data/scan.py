"""Reading the small facts of many files: headers of pictures and texts of captions, in parallel and only once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from data.headers import Header, PictureError, read_header
from data.index import Index
from data.text import BrokenFileError, read_text
from data.walk import Folder, split_name

_THREADS = 8
_LOT = 100
# Files that are in memory take a fifth of this; more means that a disk or a network is waited for.
_SLOW_SECONDS = 150e-6

# A header as three numbers, a text with its warning, or the reason why there is neither.
Fact = list[Any]
# Which of them belong to pictures; a reason belongs to either.
_KINDS: dict[tuple[type, ...], bool | None] = {
    (str,): None,
    (int, int, int): True,
    (str, str): False,
    (str, type(None)): False,
}
Job = tuple[Folder, str, bool]


class Facts:
    """What the files of some folders say, read by `read` or when asked for."""

    def __init__(self, index: Index | None = None) -> None:
        self._index = index
        self._facts: dict[str, Fact] = {}

    def read(
        self,
        folders: Sequence[Folder],
        pictures: frozenset[str],
        texts: frozenset[str],
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Read all files with an extension in `pictures` or `texts`; `progress` hears the number of each lot."""
        jobs = self._unknown(folders, pictures, texts)
        while first := list(islice(jobs, _LOT)):
            start = time.perf_counter()
            self._keep(first, _read_lot(first), progress)
            if time.perf_counter() - start > _SLOW_SECONDS * len(first):
                break
        # Threads pay when the disk makes us wait; with files in memory they only wait for each other.
        with ThreadPoolExecutor(_THREADS) as pool:
            lots = iter(lambda: list(islice(jobs, _LOT)), [])
            while some := list(islice(lots, _THREADS * 2)):
                for lot, facts in zip(some, pool.map(_read_lot, some), strict=True):
                    self._keep(lot, facts, progress)

    def header(self, folder: Folder, name: str) -> Header:
        """The header of a picture.

        Raises:
            PictureError: there is none, with the reason.
        """
        fact = self._facts.pop(folder.at(name), None) or _read((folder, name, True))
        if len(fact) == 1:
            raise PictureError(fact[0])
        return Header(*fact)

    def text(self, folder: Folder, name: str) -> tuple[str, str | None]:
        """The text of a file, and a warning if its encoding had to be guessed.

        Raises:
            BrokenFileError: it cannot be read, with the reason.
        """
        path = folder.at(name)
        fact = self._facts.pop(path, None) or _read((folder, name, False))
        if len(fact) == 1:
            raise BrokenFileError(path, None, fact[0])
        return fact[0], fact[1]

    def _unknown(self, folders: Iterable[Folder], pictures: frozenset[str], texts: frozenset[str]) -> Iterator[Job]:
        for folder in folders:
            for name in folder.files:
                suffix = split_name(name)[1]
                if suffix not in pictures and suffix not in texts:
                    continue
                stamp = folder.stamps.get(name)
                if self._index is not None and stamp is not None:
                    known = self._index.known(folder.id, name, stamp)
                    if known is not None and _fits(known, suffix in pictures):
                        self._facts[folder.at(name)] = known
                        continue
                yield folder, name, suffix in pictures

    def _keep(self, jobs: Sequence[Job], facts: Iterable[Fact], progress: Callable[[int], object] | None) -> None:
        for (folder, name, _), fact in zip(jobs, facts, strict=True):
            self._facts[folder.at(name)] = fact
            if self._index is not None and name in folder.stamps:
                self._index.learn(folder.id, name, folder.stamps[name], fact)
        if progress is not None:
            progress(len(jobs))


def _read_lot(jobs: Sequence[Job]) -> list[Fact]:
    return [_read(job) for job in jobs]


def _read(job: Job) -> Fact:
    folder, name, is_picture = job
    try:
        if is_picture:
            return [*read_header(folder.at(name))]
        return [*read_text(folder.at(name))]
    except PictureError as error:
        return [str(error)]
    except BrokenFileError as error:
        return [error.reason]


def _fits(fact: Fact, is_picture: bool) -> bool:
    """Whether a stored fact is one: the index is a file, and files of strangers hold anything."""
    kinds = tuple(map(type, fact))
    return kinds in _KINDS and _KINDS[kinds] in (None, is_picture)
