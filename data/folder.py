"""From folders of captioned pictures to items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data.captions import caption_from_name
from data.headers import PictureError, read_header
from data.item import Caption, Item
from data.nodes import parse_yaml
from data.settings import NOTHING, Note, Notes, Settings, caption_settings, make_item, merge, read_number, read_settings
from data.text import BrokenFileError, read_text
from data.walk import IMAGE_SUFFIXES, Folder, split_name, walk
from utils.errors import ProblemsError, UserError, printable

# Later ones are more specific.
SIDECARS = (".txt", ".caption", ".yml", ".yaml")
_NUMBERS = ("multiply", "cond_dropout", "flip_p", "loss_scale")
_FOLDER_FILES = frozenset(
    [f"{name}.txt" for name in (*_NUMBERS, "batch_id", "shuffle_tags")]
    + [f"{name}{suffix}" for name in ("local", "global") for suffix in (".yml", ".yaml")]
)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A picture that is left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


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


def find_items(roots: Iterable[str | Path], *, progress: Callable[[int], None] | None = None) -> Found:
    """The pictures below `roots` with their captions and settings. `progress` hears the number of each batch seen.

    Raises:
        UserError: a root is no folder.
        ProblemsError: settings that cannot be meant, all at once, each with its file.
    """
    notes = Notes()
    items: list[Item] = []
    unreadable: list[Unreadable] = []
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(
                f"data_root: there is no folder {printable(root)}. Put pictures with their captions there "
                "(photo.jpg, photo.txt), or name another folder with --data_root; "
                "to see a first training without any, run: python train.py --config starter/train.json"
            )
        seen = _Root(str(root), notes, progress)
        items.extend(sorted(seen.items, key=lambda item: item.id))
        unreadable.extend(sorted(seen.unreadable, key=lambda picture: picture.path))
    if notes.problems:
        raise ProblemsError(notes.problems)
    return Found(unique_ids(items), tuple(unreadable), tuple(notes.warnings))


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

    def __init__(self, root: str, notes: Notes, progress: Callable[[int], None] | None) -> None:
        self.notes = notes
        self.items: list[Item] = []
        self.unreadable: list[Unreadable] = []
        inherited: dict[str, Settings] = {}
        for folder in walk(root, notes):
            above = NOTHING if folder.parent is None else inherited[folder.parent]
            inherited[folder.id] = merge(above, self._settings_files(folder, "global"))
            own = merge(inherited[folder.id], self._number_files(folder))
            self._pictures(folder, merge(own, self._settings_files(folder, "local")))
            if progress is not None:
                progress(len(folder.files))

    def _settings_files(self, folder: Folder, stem: str) -> Settings:
        settings = NOTHING
        for suffix in (".yml", ".yaml"):
            for name in folder.files:
                if name.lower() == stem + suffix:
                    settings = merge(settings, self._folder_yaml(folder.at(name)))
        return settings

    def _folder_yaml(self, path: str) -> Settings:
        try:
            return self._yaml(path, NOTHING)
        except BrokenFileError as error:
            self.notes.broken(error)
            return NOTHING

    def _number_files(self, folder: Folder) -> Settings:
        settings = NOTHING
        for name in folder.files:
            stem, suffix = split_name(name.lower())
            if suffix != ".txt" or name.lower() not in _FOLDER_FILES:
                continue
            path = folder.at(name)
            if stem == "shuffle_tags":
                settings = replace(settings, shuffle_tags=True)
                continue
            try:
                text = self._text(path)
            except BrokenFileError as error:
                self.notes.broken(error)
                continue
            if stem == "batch_id":
                settings = replace(settings, batch_id=text.strip())
            else:
                settings = merge(settings, read_number(stem, text, path, self.notes))
        return settings

    def _pictures(self, folder: Folder, settings: Settings) -> None:
        pictures: list[tuple[str, str]] = []
        sidecars: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in folder.files:
            stem, suffix = split_name(name)
            if suffix in IMAGE_SUFFIXES:
                pictures.append((name, stem))
            elif suffix in SIDECARS and name.lower() not in _FOLDER_FILES:
                sidecars[stem].append((SIDECARS.index(suffix), name))
        self._same_stems(folder, pictures)
        for name in folder.others:
            if split_name(name)[1] in IMAGE_SUFFIXES:
                reason = "is no regular file (a pipe, a device or a broken link)"
                self.unreadable.append(Unreadable(folder.at(name), reason))
        prefix = f"{folder.id}/" if folder.id else ""
        for name, stem in pictures:
            path = folder.at(name)
            try:
                header = read_header(path)
                merged = settings
                for _, sidecar in sorted(sidecars[stem]):
                    merged = merge(merged, self._sidecar(folder.at(sidecar)))
            except (PictureError, BrokenFileError) as error:
                self.unreadable.append(Unreadable(path, str(error)))
                continue
            fallback = caption_from_name(stem) if merged.main_prompt is None else Caption("")
            self.items.append(make_item(prefix + name, path, header.width, header.height, merged, fallback))

    def _same_stems(self, folder: Folder, pictures: list[tuple[str, str]]) -> None:
        names: dict[str, list[str]] = defaultdict(list)
        for name, stem in pictures:
            names[stem].append(name)
        for same in names.values():
            if len(same) > 1:
                where = folder.at(same[0])
                self.notes.warn(where, f"shares its captions with {', '.join(map(printable, same[1:]))}")

    def _sidecar(self, path: str) -> Settings:
        if path[-4:].lower() in (".txt", "tion"):
            return caption_settings(self._text(path))
        # An empty caption file is an empty caption, in whatever form.
        return self._yaml(path, caption_settings(""))

    def _yaml(self, path: str, empty: Settings) -> Settings:
        tree = parse_yaml(self._text(path), path)
        return empty if tree is None else read_settings(tree, path, self.notes)

    def _text(self, path: str) -> str:
        text, warning = read_text(path)
        if warning is not None:
            self.notes.warn(path, warning)
        return text
