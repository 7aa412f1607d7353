"""Folders as they were last read: when nothing in one has changed, none of its files need be looked into."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.contents import Contents
from data.index import FRESH_NS
from data.item import Caption, Item, Tag
from data.settings import Note, Notes, Unreadable
from data.walk import Folder, portable
from utils.files import atomic_file

# What follows id, path, width, height and caption in an item.
_SETTINGS = tuple(field.name for field in dataclasses.fields(Item))[5:]
_DEFAULTS = [field.default for field in dataclasses.fields(Item)][5:]
_READERS = ("captions", "contents", "headers", "item", "nodes", "settings", "shelf", "text", "walk")


class Shelf:
    """The contents of folders, kept in a file next to that of the index.

    A folder is recognised by the names, sizes and times of its files, and by those of all settings files that it
    inherits from. The file carries a hash of itself: what is not as it was written is not believed.
    """

    def __init__(self, index_path: Path) -> None:
        self._path = index_path.with_stem(f"{index_path.stem}-items")
        self._started_ns = time.time_ns()
        self._rows, self._last_ns = self._load()
        self._digests: dict[str, str] = {}
        self._kept: dict[str, Any] = {}
        self._changed = False

    def known(self, folders: Sequence[Folder]) -> dict[str, Contents]:
        """The contents, by folder id, of those folders that are as they were."""
        chains: dict[str, str] = {}
        contents: dict[str, Contents] = {}
        for folder in folders:
            above = "" if folder.parent is None else chains[folder.parent]
            special = [(name, folder.stamps[name]) for name in folder.special]
            # Too young to be believed here means too young for all folders that inherit from here.
            young = any(stamp.mtime_ns > self._last_ns - FRESH_NS for _, stamp in special)
            chains[folder.id] = _hash([above, special, self._last_ns if young else 0])
            stamps = [folder.stamps[name] for name in folder.files]
            digest = _hash([_program(), chains[folder.id], folder.path, folder.files, folder.others, stamps])
            self._digests[folder.id] = digest
            row = self._rows.get(folder.id)
            newest = max((stamp.mtime_ns for stamp in stamps), default=0)
            if row is not None and row[0] == digest and newest <= self._last_ns - FRESH_NS:
                contents[folder.id] = _unpacked(folder, row)
                self._kept[folder.id] = row
        return contents

    def keep(self, folder: Folder, contents: Contents) -> None:
        """Remember a folder that had to be read. One with problems is not worth it: they will be mended."""
        self._changed = True
        if not contents.notes.problems:
            self._kept[folder.id] = _packed(folder, contents, self._digests[folder.id])

    def save(self) -> None:
        """Write the file, whole or not at all; where that cannot be, the next start takes longer."""
        if not self._changed and len(self._kept) == len(self._rows):
            return
        text = json.dumps({"started_ns": self._started_ns, "folders": self._kept}, separators=(",", ":"))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as partial:
                partial.write_text(f"{_hash(text)}\n{text}", encoding="ascii", newline="\n")
        except OSError:
            return

    def _load(self) -> tuple[dict[str, Any], int]:
        try:
            digest, _, text = self._path.read_text(encoding="ascii").partition("\n")
            if digest != _hash(text):
                return {}, 0
            document = json.loads(text)
            return document["folders"], document["started_ns"]
        except (OSError, ValueError):
            return {}, 0


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@lru_cache(maxsize=1)
def _program() -> str:
    """A hash of the code that reads folders: another version of it may understand them in another way."""
    return _hash([Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in _READERS])


def _packed(folder: Folder, contents: Contents, digest: str) -> list[Any]:
    items = []
    for item in contents.items:
        tags = [tag.text if tag.weight == 1.0 else [tag.text, tag.weight] for tag in item.caption.tags]
        name = item.path.removeprefix(folder.at(""))
        row = [name, item.width, item.height, item.caption.main_prompt, tags]
        settings = [getattr(item, name) for name in _SETTINGS]
        if settings != _DEFAULTS or item.caption.max_length is not None:
            row += [item.caption.max_length, *settings]
        items.append(row)
    unreadable = [[picture.path, picture.reason] for picture in contents.unreadable]
    warnings = [[note.where, note.text] for note in contents.notes.warnings]
    return [digest, items, unreadable, warnings]


def _unpacked(folder: Folder, row: list[Any]) -> Contents:
    _, rows, unreadable, warnings = row
    prefix = f"{folder.id}/" if folder.id else ""
    items = []
    plain: dict[str, Tag] = {}
    for name, width, height, main_prompt, texts, *settings in rows:
        # Tags come again and again: one object each is quicker than many.
        tags = tuple(
            Tag(*text) if type(text) is list else plain.get(text) or plain.setdefault(text, Tag(text)) for text in texts
        )
        caption = Caption(main_prompt, tags, settings[0] if settings else None)
        items.append(Item(prefix + portable(name), folder.at(name), width, height, caption, *settings[1:]))
    notes = Notes(warnings=[Note(*note) for note in warnings])
    return Contents(tuple(items), tuple(Unreadable(*picture) for picture in unreadable), notes)
