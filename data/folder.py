"""From folders of captioned pictures to items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data.captions import EMPTY, caption_from_name
from data.headers import PictureError
from data.index import Index, index_path
from data.item import Item
from data.nodes import parse_yaml
from data.scan import Facts
from data.settings import (
    NOTHING,
    Note,
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
from data.walk import IMAGE_SUFFIXES, Folder, split_name, walk
from utils.errors import ProblemsError, UserError, printable

# Later ones are more specific.
SIDECARS = (".txt", ".caption", ".yml", ".yaml")
_TEXT_SUFFIXES = frozenset(SIDECARS)


@dataclass(frozen=True, slots=True)
class Found:
    """What the data roots hold.

    Args:
        items: in the order of their ids, root by root; ids are unique.
        unreadable: pictures that are left out, each with its reason.
        warnings: what changes nothing and yet should be known.
    """

    items: tuple[Item, ...]
    unreadable: tuple[Unreadable, ...]
    warnings: tuple[Note, ...]


def find_items(roots: Iterable[str | Path]) -> Found:
    """The pictures below `roots`, without an index (`data.sources.find_data` takes every form of data_root).

    Raises:
        UserError: a root is no folder.
        ProblemsError: settings that cannot be meant, all at once, each with its file.
    """
    notes = Notes()
    items: list[Item] = []
    unreadable: list[Unreadable] = []
    for root in roots:
        some, left_out = read_folder(str(root), notes)
        items.extend(some)
        unreadable.extend(left_out)
    if notes.problems:
        raise ProblemsError(notes.problems)
    return Found(unique_ids(items), tuple(unreadable), tuple(notes.warnings))


def read_folder(
    root: str, notes: Notes, *, index_kind: str = "off", progress: Callable[[int], None] | None = None
) -> tuple[list[Item], list[Unreadable]]:
    """The pictures below `root` in the order of their ids, and those that cannot be read; mistakes go to `notes`.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(root).is_dir():
        raise UserError(
            f"data_root: there is no folder {printable(root)}. Put pictures with their captions there "
            "(photo.jpg, photo.txt), or name another folder with --data_root; "
            "to see a first training without any, run: python train.py --config starter/train.json"
        )
    path = index_path(index_kind, Path(root))
    index = None if path is None else Index(path)
    seen = _Root(root, notes, index, progress)
    if index is not None:
        index.save()
    return (
        sorted(seen.items, key=lambda item: item.id),
        sorted(seen.unreadable, key=lambda picture: picture.path),
    )


def unique_ids(items: Iterable[Item]) -> tuple[Item, ...]:
    """The items, where the second of an id is called `id#2`: two roots may hold the same relative path."""
    times: dict[str, int] = defaultdict(int)
    unique = []
    for item in items:
        times[item.id] += 1
        unique.append(item if times[item.id] == 1 else replace(item, id=f"{item.id}#{times[item.id]}"))
    return tuple(unique)


class _Root:
    """One data root while it is read."""

    def __init__(self, root: str, notes: Notes, index: Index | None, progress: Callable[[int], None] | None) -> None:
        self.notes = notes
        self.items: list[Item] = []
        self.unreadable: list[Unreadable] = []
        self._facts = Facts(index)
        folders = list(walk(root, notes, stamped=index is not None))
        self._facts.read(folders, IMAGE_SUFFIXES, _TEXT_SUFFIXES, progress)
        inherited: dict[str, Settings] = {}
        for folder in folders:
            above = NOTHING if folder.parent is None else inherited[folder.parent]
            inherited[folder.id] = merge(above, self._settings_files(folder, "global"))
            own = merge(inherited[folder.id], self._number_files(folder))
            self._pictures(folder, merge(own, self._settings_files(folder, "local")))

    def _settings_files(self, folder: Folder, stem: str) -> Settings:
        settings = NOTHING
        for wanted in (f"{stem}.yml", f"{stem}.yaml"):
            for name in folder.special:
                if name.lower() == wanted:
                    settings = merge(settings, self._folder_file(folder, name))
        return settings

    def _number_files(self, folder: Folder) -> Settings:
        settings = NOTHING
        for name in folder.special:
            if name.lower().endswith(".txt"):
                settings = merge(settings, self._folder_file(folder, name))
        return settings

    def _folder_file(self, folder: Folder, name: str) -> Settings:
        stem, suffix = split_name(name.lower())
        if stem == "shuffle_tags":
            return Settings(shuffle_tags=True)
        try:
            if suffix != ".txt":
                return self._yaml(folder, name, NOTHING)
            text = self._text(folder, name)
        except BrokenFileError as error:
            self.notes.broken(error)
            return NOTHING
        if stem == "batch_id":
            return Settings(batch_id=" ".join(text.split()))
        return read_number(stem, text, folder.at(name), self.notes)

    def _pictures(self, folder: Folder, settings: Settings) -> None:
        pictures: dict[str, list[str]] = defaultdict(list)
        sidecars: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in folder.files:
            stem, suffix = split_name(name)
            if suffix in IMAGE_SUFFIXES:
                pictures[stem].append(name)
            elif suffix in _TEXT_SUFFIXES and name not in folder.special:
                sidecars[stem].append((SIDECARS.index(suffix), name))
        for name in folder.others:
            if split_name(name)[1] in IMAGE_SUFFIXES:
                reason = "is no regular file (a pipe, a device or a broken link)"
                self.unreadable.append(Unreadable(folder.at(name), reason))
        for stem, names in pictures.items():
            if len(names) > 1:
                others = ", ".join(map(printable, names[1:]))
                self.notes.warn(folder.at(names[0]), f"shares its captions with {others}")
            self._same_stem(folder, stem, names, [name for _, name in sorted(sidecars.get(stem, ()))], settings)

    def _same_stem(self, folder: Folder, stem: str, names: list[str], sidecars: list[str], settings: Settings) -> None:
        """Add the pictures of one stem, which share their sidecars."""
        broken = None
        try:
            for sidecar in sidecars:
                settings = merge(settings, self._sidecar(folder, sidecar))
        except BrokenFileError as error:
            broken = f"{error.place}: {error.reason}"
        fallback = caption_from_name(stem) if settings.main_prompt is None else EMPTY
        for name in names:
            try:
                header = self._facts.header(folder, name)
            except PictureError as error:
                self.unreadable.append(Unreadable(folder.at(name), str(error)))
                continue
            if broken is not None:
                self.unreadable.append(Unreadable(folder.at(name), broken))
                continue
            id = f"{folder.id}/{name}" if folder.id else name
            self.items.append(make_item(id, folder.at(name), header.width, header.height, settings, fallback))

    def _sidecar(self, folder: Folder, name: str) -> Settings:
        if split_name(name)[1] in (".txt", ".caption"):
            return caption_settings(self._text(folder, name))
        # An empty caption file is an empty caption, in whatever form.
        return self._yaml(folder, name, caption_settings(""))

    def _yaml(self, folder: Folder, name: str, empty: Settings) -> Settings:
        path = folder.at(name)
        tree = parse_yaml(self._text(folder, name), path)
        return empty if tree is None else read_settings(tree, path, self.notes)

    def _text(self, folder: Folder, name: str) -> str:
        text, warning = self._facts.text(folder, name)
        if warning is not None:
            self.notes.warn(folder.at(name), warning)
        return text
