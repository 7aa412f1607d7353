"""The validation file: its keys, their checks, and the updates after which validation is due."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from utils.errors import Problem, ProblemsError
from utils.options import read_json_object
from utils.schema import option, read_values

# Older files call these so.
OLD_NAMES = {"val_split_proportion": "auto_split_proportion", "val_data_root": "manual_data_root"}
COMMENTS = ("documentation", "doc")
PAGE = "docs/watching.md"
# Names of sets, as in `loss/{name}`.
VALIDATION, STABILIZED, COMBINED = "val", "train-stabilized", "_all_val_combined"


@dataclass(frozen=True, slots=True)
class ValidationFile:
    """The keys of a validation file."""

    validate_training: bool = option(True, "hold images out of the training and watch the loss on them")
    val_split_mode: str = option(
        "automatic",
        "automatic holds out a share of the training images, manual reads manual_data_root, none does neither",
        choices=("automatic", "manual", "none"),
    )
    auto_split_proportion: float = option(0.15, "share of the training images that is held out", low=0, high=0.9)
    manual_data_root: str | None = option(None, "folder of images that are not trained")
    extra_manual_datasets: Any = option(None, "more folders to watch: { name: folder }")
    stabilize_training_loss: bool = option(False, "watch the loss on a fixed part of the trained images, too")
    stabilize_split_proportion: float = option(0.15, "share of the trained images in that part", low=0, high=1)
    every_n_epochs: float = option(1.0, "epochs between passes; 0.5 is twice an epoch", low=0.001)
    seed: int = option(555, "which images are held out, and their noise", low=0)
    # Not the training's: matrix kernels of other shapes round differently, and the curve would move with it.
    batch_size: int = option(4, "images in a forward pass; another one changes the seventh digit", low=1, high=256)
    use_relative_loss: bool = option(False, "show losses as shares of those before the first update, too")


def read_validation_file(path: Path | str) -> tuple[ValidationFile, list[str]]:
    """The file's settings, and a warning for each name of older files.

    Raises:
        ProblemsError: with everything that is wrong with the file.
    """
    where = str(path)
    raw = {key: value for key, value in read_json_object(Path(path)).items() if key not in COMMENTS}
    warnings = []
    for old, new in OLD_NAMES.items():
        if old in raw:
            warnings.append(f"{where}: {old} is called {new} now")
            raw.setdefault(new, raw[old])
            del raw[old]
    values, problems = read_values(ValidationFile, raw, where, PAGE)
    extra = values.get("extra_manual_datasets")
    if extra is not None and not _is_named_folders(extra):
        problems.append(Problem(where, "extra_manual_datasets", extra, "must be an object of names and folders"))
        del values["extra_manual_datasets"]
    file = ValidationFile(**values)
    for name in sorted(_taken_names(file) & set(file.extra_manual_datasets or {})):
        remedy = f"is the name of another curve, loss/{name}; call the set something else"
        problems.append(Problem(where, "extra_manual_datasets", name, remedy))
    if not problems and file.validate_training and file.val_split_mode == "manual" and file.manual_data_root is None:
        problems.append(Problem(where, "manual_data_root", None, "is missing; val_split_mode = manual needs a folder"))
    if problems:
        raise ProblemsError(problems)
    return file, warnings


def _taken_names(file: ValidationFile) -> set[str]:
    taken = {COMBINED, "log_step", "epoch"}
    taken |= {VALIDATION} if file.validate_training and file.val_split_mode != "none" else set()
    return taken | ({STABILIZED} if file.stabilize_training_loss else set())


def _is_named_folders(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        name.strip() and isinstance(folder, str) for name, folder in value.items()
    )


def validation_updates(
    updates_of_epochs: Sequence[int], every_n_epochs: float, total: int | None = None
) -> frozenset[int]:
    """The updates of the run after which validation is due: 0 (before the first), every so many epochs, the last.

    Fractions of an epoch fall on its nearest update. `total`: the run ends after so many updates.
    """
    ends = [0, *accumulate(updates_of_epochs)]
    epochs = len(updates_of_epochs)
    due = {0, ends[-1]}
    for number in range(1, math.floor(epochs / every_n_epochs + 1e-9) + 1):
        place = min(number * every_n_epochs, float(epochs))
        epoch = min(math.floor(place + 1e-9), epochs)
        inside = max(0.0, place - epoch)
        due.add(ends[epoch] if epoch == epochs else ends[epoch] + round(inside * updates_of_epochs[epoch]))
    last = ends[-1] if total is None else total
    return frozenset(update for update in due if update <= last) | {last}


def epoch_of(update: int, updates_of_epochs: Sequence[int]) -> int:
    """The epoch, from 1, that the update number `update` (from 1) belongs to; 0 before the first."""
    return 0 if update == 0 else bisect.bisect_left(list(accumulate(updates_of_epochs)), update) + 1
