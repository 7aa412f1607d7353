"""The images that are watched and not trained: how they are chosen, and what is read of other folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.checks import find_duplicates
from data.item import Item
from data.validation_file import STABILIZED, VALIDATION, ValidationFile
from utils.seeding import stream_seed

Groups = Sequence[Sequence[Item]]


@dataclass(frozen=True, slots=True)
class WatchedSet:
    """Images whose loss is watched under `loss/{name}`; `trained`: they are trained as well."""

    name: str
    items: tuple[Item, ...]
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which images are trained and which are watched, with a line for the log for each thing worth knowing."""

    training: tuple[Item, ...]
    sets: tuple[WatchedSet, ...]
    notes: tuple[str, ...]


def arrange(
    file: ValidationFile,
    items: Sequence[Item],
    read_folder: Callable[[str], Sequence[Item]],
    duplicates: Groups = (),
) -> Arrangement:
    """What `file` asks for, of the images `items` and of other folders.

    Args:
        read_folder: gives the images of a folder, and raises `UserError` for one that cannot be used.
        duplicates: groups of images that hold the same bytes.
    """
    training, sets, notes = tuple(items), [], []
    if file.validate_training and file.val_split_mode == "automatic":
        training, held_out = hold_out(items, file.auto_split_proportion, file.seed, duplicates)
        sets.append(WatchedSet(VALIDATION, held_out))
        notes.append(f"validation: {len(held_out)} of {len(items)} images are held out of the training")
        if not held_out and file.auto_split_proportion > 0:
            notes[-1] = "validation: no image can be held out without parting duplicates or a batch_id group"
    elif file.validate_training and file.val_split_mode == "manual":
        assert file.manual_data_root is not None
        sets.append(WatchedSet(VALIDATION, tuple(read_folder(file.manual_data_root))))
    for name, folder in (file.extra_manual_datasets or {}).items():
        sets.append(WatchedSet(name, tuple(read_folder(folder))))
    if file.stabilize_training_loss:
        _, part = hold_out(training, file.stabilize_split_proportion, file.seed, duplicates, least_left=0)
        sets.append(WatchedSet(STABILIZED, part, trained=True))
    # What was held out here has been kept apart from its copies already.
    folders = {*(file.extra_manual_datasets or {}), *([VALIDATION] if file.val_split_mode == "manual" else [])}
    for watched in sets:
        if not watched.items:
            notes.append(f"validation: the set {watched.name} has no images and is left out")
        elif watched.name in folders and (same := _also_trained(watched.items, training)):
            notes.append(
                f"validation: {same} of {len(watched.items)} images of the set {watched.name} are trained as well, so "
                f"loss/{watched.name} tells how well they are remembered; take them out of one of the two folders"
            )
    return Arrangement(training, tuple(watched for watched in sets if watched.items), tuple(notes))


def _also_trained(items: Sequence[Item], training: Sequence[Item]) -> int:
    """How many of `items` are the same file as one of `training`, or hold the same bytes."""
    trained = {item.path for item in training}
    same = set(trained)
    with suppress(OSError):  # decoding will name the file and the reason
        sizes = {Path(item.path).stat().st_size for item in items}
        alike = [item for item in training if Path(item.path).stat().st_size in sizes]
        for group in find_duplicates([*alike, *items]):
            paths = {item.path for item in group}
            same |= paths if paths & trained else set()
    return sum(item.path in same for item in items)


def hold_out(
    items: Sequence[Item], proportion: float, seed: int, duplicates: Groups = (), *, least_left: int = 1
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """`items` in two, in the given order: what stays, and the `proportion` (nearest whole number) that is held out.

    Equal files (`duplicates`) and the images of a named batch_id stay on one side: a held-out copy of a trained image
    would say nothing. Each group's place in the draw depends on the seed and its first id only, so that an image more
    does not reshuffle the others. At least one image is held out, if that can be and `proportion` > 0; `least_left`
    stay.
    """
    wanted = min(round(len(items) * proportion), len(items) - least_left)
    if proportion > 0 and len(items) > least_left:
        wanted = max(wanted, 1)
    groups = _inseparable(items, duplicates)
    groups.sort(key=lambda group: stream_seed(seed, "hold out", min(i.id for i in group)))
    held: set[str] = set()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(item.id for item in group)
    if not held and wanted > 0:
        smallest = min(groups, key=len)
        if len(smallest) <= len(items) - least_left:
            held.update(item.id for item in smallest)
    stay = tuple(item for item in items if item.id not in held)
    return stay, tuple(item for item in items if item.id in held)


def _inseparable(items: Sequence[Item], duplicates: Groups) -> list[list[Item]]:
    """The items in groups that a split must not part: equal content, or one named batch_id, and what hangs together."""
    leader = {item.id: item.id for item in items}
    same = [present for group in duplicates if (present := [item for item in group if item.id in leader])]

    def find(id: str) -> str:
        while leader[id] != id:
            leader[id] = leader[leader[id]]
            id = leader[id]
        return id

    for group in (*_named(items), *same):
        first = find(group[0].id)
        for other in group[1:]:
            leader[find(other.id)] = first
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[find(item.id)].append(item)
    return list(groups.values())


def _named(items: Iterable[Item]) -> list[list[Item]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.batch_id:
            groups[item.batch_id].append(item)
    return list(groups.values())
