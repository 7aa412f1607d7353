"""One folder of a data root: its pictures with their captions and settings."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from data.captions import EMPTY, caption_from_name
from data.headers import PictureError
from data.item import Item
from data.nodes import parse_yaml
from data.scan import Facts
from data.settings import (
    NOTHING,
    Notes,
    Settings,
    Unreadable,
    caption_settings,
    make_item,
    merge,
    read_number,
    read_settings,
)
from data.text import BrokenFileError
from data.walk import IMAGE_SUFFIXES, Folder, portable, split_name
from utils.errors import printable

# Later ones are more specific.
SIDECARS = (".txt", ".caption", ".yml", ".yaml")
TEXT_SUFFIXES = frozenset(SIDECARS)


@dataclass(frozen=True, slots=True)
class Contents:
    """What one folder holds, without those inside it, and what is to be said about it."""

    items: tuple[Item, ...]
    unreadable: tuple[Unreadable, ...]
    notes: Notes


def inherited_settings(folder: Folder, above: Settings, facts: Facts, notes: Notes) -> Settings:
    """What holds for `folder` and all folders below it: `above`, which it inherits, and its own global.yaml."""
    return merge(above, _Reader(folder, facts, notes).settings_files("global"))


def read_contents(folder: Folder, inherited: Settings, facts: Facts, notes: Notes) -> Contents:
    """The pictures of `folder`, where `inherited` is what `inherited_settings` gave for it; `notes` goes into them."""
    return _Reader(folder, facts, notes).contents(inherited)


class _Reader:
    """A folder while it is read."""

    def __init__(self, folder: Folder, facts: Facts, notes: Notes) -> None:
        self._folder, self._facts, self._notes = folder, facts, notes
        self._items: list[Item] = []
        self._unreadable: list[Unreadable] = []

    def contents(self, inherited: Settings) -> Contents:
        own = merge(inherited, self._number_files())
        self._pictures(merge(own, self.settings_files("local")))
        return Contents(tuple(self._items), tuple(self._unreadable), self._notes)

    def settings_files(self, stem: str) -> Settings:
        settings = NOTHING
        for wanted in (f"{stem}.yml", f"{stem}.yaml"):
            for name in self._folder.special:
                if name.lower() == wanted:
                    settings = merge(settings, self._folder_file(name))
        return settings

    def _number_files(self) -> Settings:
        settings = NOTHING
        for name in self._folder.special:
            if name.lower().endswith(".txt"):
                settings = merge(settings, self._folder_file(name))
        return settings

    def _folder_file(self, name: str) -> Settings:
        stem, suffix = split_name(name.lower())
        if stem == "shuffle_tags":
            return Settings(shuffle_tags=True)
        try:
            if suffix != ".txt":
                return self._yaml(name, NOTHING)
            text = self._text(name)
        except BrokenFileError as error:
            self._notes.broken(error)
            return NOTHING
        if stem == "batch_id":
            return Settings(batch_id=" ".join(text.split()))
        return read_number(stem, text, self._folder.at(name), self._notes)

    def _pictures(self, settings: Settings) -> None:
        pictures: dict[str, list[str]] = defaultdict(list)
        sidecars: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in self._folder.files:
            stem, suffix = split_name(name)
            if suffix in IMAGE_SUFFIXES:
                pictures[stem].append(name)
            elif suffix in TEXT_SUFFIXES and name not in self._folder.special:
                sidecars[stem].append((SIDECARS.index(suffix), name))
        for name in self._folder.others:
            if split_name(name)[1] in IMAGE_SUFFIXES:
                reason = "is no regular file (a pipe, a device or a broken link)"
                self._unreadable.append(Unreadable(self._folder.at(name), reason))
        for stem, names in pictures.items():
            if len(names) > 1:
                others = ", ".join(map(printable, names[1:]))
                self._notes.warn(self._folder.at(names[0]), f"shares its captions with {others}")
            self._same_stem(stem, names, [name for _, name in sorted(sidecars.get(stem, ()))], settings)

    def _same_stem(self, stem: str, names: list[str], sidecars: list[str], settings: Settings) -> None:
        """Add the pictures of one stem, which share their sidecars."""
        broken = None
        try:
            for sidecar in sidecars:
                settings = merge(settings, self._sidecar(sidecar))
        except BrokenFileError as error:
            broken = f"{error.place}: {error.reason}"
        fallback = caption_from_name(portable(stem)) if settings.main_prompt is None else EMPTY
        for name in names:
            try:
                header = self._facts.header(self._folder, name)
            except PictureError as error:
                self._unreadable.append(Unreadable(self._folder.at(name), str(error)))
                continue
            if broken is not None:
                self._unreadable.append(Unreadable(self._folder.at(name), broken))
                continue
            id = f"{self._folder.id}/{portable(name)}" if self._folder.id else portable(name)
            self._items.append(make_item(id, self._folder.at(name), header.width, header.height, settings, fallback))

    def _sidecar(self, name: str) -> Settings:
        if split_name(name)[1] in (".txt", ".caption"):
            return caption_settings(self._text(name))
        # An empty caption file is an empty caption, in whatever form.
        return self._yaml(name, caption_settings(""))

    def _yaml(self, name: str, empty: Settings) -> Settings:
        path = self._folder.at(name)
        tree = parse_yaml(self._text(name), path)
        return empty if tree is None else read_settings(tree, path, self._notes)

    def _text(self, name: str) -> str:
        text, warning = self._facts.text(self._folder, name)
        if warning is not None:
            self._notes.warn(self._folder.at(name), warning)
        return text
