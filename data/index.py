"""What the last start learned of each file, so that the next one reads only what has changed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from utils.files import atomic_file

VERSION = 1
# A file that is changed twice within one tick of the disk's clock keeps its time: what was this young when the
# last start looked at it is read again.
FRESH_NS = 2_000_000_000


class Stamp(NamedTuple):
    """What tells that a file has changed: its size in bytes and its time in nanoseconds."""

    size: int
    mtime_ns: int


class Index:
    """Facts by folder and file name. They are plain JSON values; whoever stores them knows what they mean."""

    def __init__(self, path: Path) -> None:
        self._path, self._started_ns = path, time.time_ns()
        self._new: dict[str, dict[str, list[Any]]] = {}
        self._changed = False

    def known(self, folder: str, name: str, stamp: Stamp) -> list[Any] | None:
        """The fact of a file, if it is still the same file."""
        rows, started_ns = self._old
        row = rows.get(folder, {}).get(name)
        if row is None or row[0] != stamp.size or row[1] != stamp.mtime_ns:
            return None
        if stamp.mtime_ns > started_ns - FRESH_NS:
            return None
        self._new.setdefault(folder, {})[name] = row
        return list(row[2:])

    @cached_property
    def _old(self) -> tuple[dict[str, dict[str, list[Any]]], int]:
        return _load(self._path)

    def learn(self, folder: str, name: str, stamp: Stamp, fact: list[Any]) -> None:
        """Remember the fact of a file."""
        self._new.setdefault(folder, {})[name] = [*stamp, *fact]
        self._changed = True

    def save(self, kept: Iterable[str] = ()) -> None:
        """Write the index, whole or not at all; a folder that cannot be written costs the next start some time.

        `kept`: folders whose files were not asked for because nothing in them has changed.
        """
        if not self._changed:
            return
        files = {folder: self._old[0][folder] for folder in kept if folder in self._old[0]} | self._new
        document = {"version": VERSION, "started_ns": self._started_ns, "files": files}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as partial:
                partial.write_text(json.dumps(document, separators=(",", ":")), encoding="ascii")
        except OSError:
            return


def index_path(kind: str, root: Path) -> Path | None:
    """Where the index of the data root `root` is kept.

    Args:
        kind: "cache", the user's cache folder; "beside", a hidden file next to the root; "off", nowhere.
    """
    if kind == "off":
        return None
    whole = root.resolve()
    if kind == "beside":
        return whole.with_name(f".{whole.name}.emulsion.json")
    assert kind == "cache"
    digest = hashlib.blake2b(os.fsencode(whole), digest_size=10).hexdigest()
    return cache_folder() / "index" / f"{digest}.json"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of this user for files that may be thrown away."""
    if given := environment.get("XDG_CACHE_HOME"):
        return Path(given) / "emulsion"
    if sys.platform == "win32" and (local := environment.get("LOCALAPPDATA")):
        return Path(local) / "emulsion"
    return Path.home() / ".cache" / "emulsion"


def _load(path: Path) -> tuple[dict[str, dict[str, list[Any]]], int]:
    """The stored facts; none when there is no index, or it is not one of ours: it is only a memory."""
    try:
        document = json.loads(path.read_text(encoding="ascii"))
        if document.get("version") != VERSION:
            return {}, 0
        files = {str(folder): dict(rows) for folder, rows in document["files"].items()}
        if not all(isinstance(row, list) and len(row) > 2 for rows in files.values() for row in rows.values()):
            return {}, 0
        return files, int(document["started_ns"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0
