"""Manifests: JSON or JSONL files that name pictures with their captions and settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data.captions import EMPTY, caption_from_name
from data.headers import PictureError, read_header
from data.item import Item
from data.nodes import Listing, Mapping, Node, Scalar, parse_json, parse_yaml
from data.settings import NOTHING, Notes, Settings, Unreadable, caption_settings, make_item, merge, read_settings
from data.text import BrokenFileError, decode_text, read_text
from utils.errors import Problem

MANIFEST_SUFFIXES = (".json", ".jsonl")
_CAPTION_FILES = (".txt", ".caption", ".yaml", ".yml")
_MAX_BYTES = 1 << 30


def read_manifest(path: str, notes: Notes) -> tuple[list[Item], list[Unreadable]]:
    """The pictures that a manifest names, in its order, and those that cannot be read.

    A manifest is all there is to its pictures: files beside them are not looked at. Mistakes go to `notes`.
    """
    items: list[Item] = []
    unreadable: list[Unreadable] = []
    folder = Path(path).parent
    try:
        for where, entry in _entries(path):
            image = _image(entry, where, notes)
            if image is None:
                continue
            settings = _settings(entry, folder, where, notes)
            file = os.path.normpath(folder / image)
            try:
                header = read_header(file) if Path(file).is_file() else None
                if header is None:
                    raise PictureError("is not there, or is no regular file")
            except PictureError as error:
                unreadable.append(Unreadable(file, f"{error} (named in {where})"))
                continue
            stem = Path(file).stem
            fallback = caption_from_name(stem) if settings.main_prompt is None else EMPTY
            items.append(make_item(_id(file, folder), file, header.width, header.height, settings, fallback))
    except BrokenFileError as error:
        notes.broken(error)
    return items, unreadable


def _entries(path: str) -> Iterator[tuple[str, Node]]:
    """The entries of the manifest, each with the words that say where it stands."""
    text = _text(path)
    if path.lower().endswith(".jsonl"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield path, parse_json(line, path, number)
        return
    tree = parse_json(text, path)
    if not isinstance(tree, Listing):
        raise BrokenFileError(path, None, 'must be a list of entries such as {"image": "a.jpg", "caption": "a cat"}')
    for number, entry in enumerate(tree.values, 1):
        yield f"{path}, entry {number}", entry


def _text(path: str) -> str:
    try:
        file = Path(path)
        if not file.is_file():
            raise BrokenFileError(path, None, "is not there, or is no regular file")
        if file.stat().st_size > _MAX_BYTES:
            raise BrokenFileError(path, None, "is larger than 1 GiB")
        return decode_text(file.read_bytes())[0]
    except OSError as error:
        raise BrokenFileError(path, None, f"cannot be read: {error.strerror}") from error


def _image(entry: Node, where: str, notes: Notes) -> str | None:
    """The path under `image`, or a problem."""
    place = where if entry.line is None else f"{where}, line {entry.line}"
    if not isinstance(entry, Mapping):
        notes.problems.append(Problem(place, "", None, 'must be an entry such as {"image": "a.jpg"}'))
        return None
    values = [value for key, value in entry.pairs if key.text == "image"]
    if not values or not isinstance(values[-1], Scalar) or not values[-1].text.strip("\0 "):
        notes.problems.append(Problem(place, "image", None, "every entry needs the path of its picture"))
        return None
    return values[-1].text.replace("\0", "")


def _settings(entry: Node, folder: Path, where: str, notes: Notes) -> Settings:
    assert isinstance(entry, Mapping)
    from_file = None
    for key, value in entry.pairs:
        if key.text == "caption" and isinstance(value, Scalar):
            file = _caption_file(value.text, folder)
            from_file = None if file is None else _read_caption(file, notes)
    if from_file is None:
        return read_settings(entry, where, notes, ignore=("image",))
    return merge(from_file, read_settings(entry, where, notes, ignore=("image", "caption")))


def _caption_file(text: str, folder: Path) -> Path | None:
    """The file that a caption names: only a caption file that is there and lies, links followed, under `folder`."""
    if len(text) > 1000 or "\n" in text or not text.lower().endswith(_CAPTION_FILES):
        return None
    try:
        file = (folder / text).resolve()
        inside = file.is_relative_to(folder.resolve()) and file.is_file()
    except (OSError, ValueError):
        return None
    return file if inside else None


def _read_caption(file: Path, notes: Notes) -> Settings:
    try:
        text, warning = read_text(str(file))
        if warning is not None:
            notes.warn(str(file), warning)
        if file.suffix.lower() in (".txt", ".caption"):
            return caption_settings(text)
        tree = parse_yaml(text, str(file))
        return caption_settings("") if tree is None else read_settings(tree, str(file), notes)
    except BrokenFileError as error:
        notes.broken(error)
        return NOTHING


def _id(file: str, folder: Path) -> str:
    """The path relative to the manifest where it lies below, else as it is."""
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
