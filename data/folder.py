"""From folders of captioned pictures to items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.contents import TEXT_SUFFIXES, inherited_settings, read_contents
from data.index import Index, index_path
from data.item import Item
from data.scan import Facts
from data.settings import NOTHING, Note, Notes, Settings, Unreadable
from data.shelf import Shelf
from data.walk import IMAGE_SUFFIXES, walk
from utils.errors import UserError, printable


@dataclass(frozen=True, slots=True)
class Found:
    """What the data roots hold.

    Args:
        items: in the order of their ids, root by root; ids are unique.
        unreadable: pictures that are left out, each with its reason.
        warnings: what changes nothing and yet should be known.
        sizes: bytes of picture files by path, as far as they came to be known.
    """

    items: tuple[Item, ...]
    unreadable: tuple[Unreadable, ...]
    warnings: tuple[Note, ...]
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)


def read_folder(
    root: str, notes: Notes, *, index_kind: str = "off", progress: Callable[[int], object] | None = None
) -> Found:
    """The pictures below `root` in the order of their ids, and those that cannot be read; mistakes go to `notes`.

    Warnings go there, too.

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
    shelf = None if path is None else Shelf(path)
    facts = Facts(index)
    folders = list(walk(root, notes, stamped=index is not None))
    known = {} if shelf is None else shelf.known(folders)
    facts.read([folder for folder in folders if folder.id not in known], IMAGE_SUFFIXES, TEXT_SUFFIXES, progress)
    items: list[Item] = []
    unreadable: list[Unreadable] = []
    sizes: dict[str, int] = {}
    inherited: dict[str, Settings] = {}
    for folder in folders:
        own = Notes()
        if len(known) < len(folders):
            above = NOTHING if folder.parent is None else inherited[folder.parent]
            inherited[folder.id] = inherited_settings(folder, above, facts, own)
        contents = known.get(folder.id)
        if contents is None:
            contents = read_contents(folder, inherited[folder.id], facts, own)
            if shelf is not None:
                shelf.keep(folder, contents)
        items.extend(contents.items)
        sizes |= {folder.at(name): stamp.size for name, stamp in folder.stamps.items()}
        unreadable.extend(contents.unreadable)
        notes.problems.extend(contents.notes.problems)
        notes.warnings.extend(contents.notes.warnings)
    if index is not None and shelf is not None:
        shelf.save()
        index.save(kept=known)
    items.sort(key=lambda item: item.id)
    unreadable.sort(key=lambda picture: picture.path)
    return Found(tuple(items), tuple(unreadable), (), sizes)


def unique_ids(items: Iterable[Item]) -> tuple[Item, ...]:
    """The items, where the second of an id is called `id#2`: two roots may hold the same relative path."""
    times: dict[str, int] = defaultdict(int)
    unique = []
    for item in items:
        times[item.id] += 1
        unique.append(item if times[item.id] == 1 else replace(item, id=f"{item.id}#{times[item.id]}"))
    return tuple(unique)
