"""The folders below a data root and the names in them, in an order that no disk decides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.index import Stamp
from data.settings import Notes

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".gif"))
FOLDER_FILES = frozenset(
    [f"{name}.txt" for name in ("multiply", "cond_dropout", "flip_p", "loss_scale", "batch_id", "shuffle_tags")]
    + [f"{name}{suffix}" for name in ("local", "global") for suffix in (".yml", ".yaml")]
)
_JUNK = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin"))


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder: `path` on the disk, `id` relative to the data root with `/` ("" for the root itself).

    Args:
        parent: the id of the folder it was reached from; `None` for the root.
        files: names of the regular files, sorted.
        special: those among them that speak for the whole folder.
        others: names that look like files but are none (pipes, devices, broken links), sorted.
        stamps: of the files, if they were asked for.
    """

    path: str
    id: str
    parent: str | None
    files: tuple[str, ...]
    special: tuple[str, ...]
    others: tuple[str, ...]
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def at(self, name: str) -> str:
        """The path of the file `name` in this folder."""
        return f"{self.path}{os.sep}{name}"


def split_name(name: str) -> tuple[str, str]:
    """The stem of a file name and its extension in small letters, with the dot."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix.lower()) if dot else (name, "")


def portable(name: str) -> str:
    """A file's name as a system that speaks UTF-8 shows it: ids and captions are the same under every locale."""
    if name.isascii():
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def walk(root: str, notes: Notes, *, stamped: bool = False) -> Iterator[Folder]:
    """Every folder at and below `root`, parents before children; `stamped`: with sizes and times of the files.

    Links to folders are followed after all real folders have been seen, and no folder is seen twice: loops end, and a
    picture that is reached in two ways belongs to the folder it lies in.
    """
    seen: set[tuple[int, int]] = set()
    real: list[tuple[str, str, str | None]] = [(root, "", None)]
    links: list[tuple[str, str, str | None]] = []
    while real or links:
        path, id, parent = real.pop() if real else links.pop(0)
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folder, inner, linked = _list(path, id, parent, stamped)
        except OSError as error:
            notes.warn(path, f"this folder cannot be read: {error.strerror}")
            continue
        real.extend(reversed(inner))
        links.extend(linked)
        yield folder


def _list(
    path: str, id: str, parent: str | None, stamped: bool
) -> tuple[Folder, list[tuple[str, str, str | None]], list[tuple[str, str, str | None]]]:
    files, others = [], []
    stamps: dict[str, Stamp] = {}
    inner: list[tuple[str, str, str | None]] = []
    linked: list[tuple[str, str, str | None]] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or name.lower() in _JUNK:
                continue
            if entry.is_file():
                files.append(name)
                if stamped:
                    status = entry.stat()
                    stamps[name] = Stamp(status.st_size, status.st_mtime_ns)
            elif entry.is_dir():
                child = (f"{path}{os.sep}{name}", f"{id}/{portable(name)}" if id else portable(name), id)
                (linked if entry.is_symlink() else inner).append(child)
            else:
                others.append(name)
    inner.sort()
    linked.sort()
    files.sort()
    special = tuple(name for name in files if name.lower() in FOLDER_FILES)
    return Folder(path, id, parent, tuple(files), special, tuple(sorted(others)), stamps), inner, linked
