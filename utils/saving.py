"""The saving of a checkpoint: written aside, proven, named, read back, and only then are older ones dropped."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint import FORMAT, FORMAT_VERSION, STATE, STATES_KEPT, Checkpoint, Record, list_checkpoints, prove
from utils.errors import TryLaterError, printable
from utils.files import drop_replaced, honour_umask, partial_path, remove_folder, replace_folder, restore_replaced
from utils.manifest import DamagedError, UnreadableError, read_manifest, verify_folder, write_manifest
from utils.tree import Tree, is_saved, save_tree, tree_bytes

GOOD_KEPT = 2
SPARE_BYTES = 64 * 2**20

logger = logging.getLogger("emulsion")


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay.

    Args:
        keep_last_n: whole checkpoints, the two newest good ones always among them; `None` keeps all.
        every_state: keep the training state with every checkpoint instead of the newest two (`save_optimizer`).
    """

    keep_last_n: int | None = None
    every_state: bool = False


def save_checkpoint(
    ckpts: Path,
    record: Record,
    *,
    exports: Callable[[Path], None],
    state: Tree | None = None,
    check: Callable[[Path], None] | None = None,
    retention: Retention | None = None,
    export_bytes: int = 0,
) -> Path:
    """Write the checkpoint `record.name` below `ckpts`, prove it, then drop what `retention` no longer keeps.

    Args:
        exports: writes the Diffusers folder into the path it is given.
        state: the training state; it must not change meanwhile (see `utils.tree.snapshot`).
        check: reads back what `exports` wrote and raises when it differs from the live weights.
        export_bytes: what `exports` will write, for the check of free space, as far as known.

    Returns its folder. Raises TryLaterError when the disk is too full, and whatever the disk raises; then nothing of it
    is left and every older checkpoint is as it was. Within one run folder only one save may be in progress.
    """
    folder = ckpts / record.name
    partial = partial_path(folder)
    earlier = list_checkpoints(ckpts)
    _require_space(ckpts, tree_bytes(state) + max([export_bytes, *(_export_bytes(c.folder) for c in earlier[:1])]))
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        if state is not None:
            _write_state(partial / STATE, record, state)
        exports(partial)
        if check is not None:
            check(partial)
        honour_umask(partial)
        write_manifest(partial, _manifest_content(record, earlier), skip=STATE)
    except BaseException:
        _remove_quietly(partial)
        raise
    _publish(partial, folder)
    try:
        drop_replaced(folder)
        prune(ckpts, Retention() if retention is None else retention)
    except (OSError, UnreadableError) as error:
        # The checkpoint is safe; what should have gone is tried again after the next save.
        logger.warning("old checkpoints in %s could not be removed: %s", printable(ckpts), printable(error))
    return folder


def _publish(partial: Path, folder: Path) -> None:
    """Give `partial` its name and read it back; on any failure what had the name before has it again."""
    try:
        replace_folder(partial, folder)
        prove(folder)
    except BaseException:
        _remove_quietly(partial) if partial.exists() else _remove_quietly(folder)
        with suppress(OSError):
            restore_replaced(folder)
        raise


def _remove_quietly(folder: Path) -> None:
    """Leave nothing of a failed save; the failure itself is the news, not what the sweep of the next start removes."""
    with suppress(OSError):
        if folder.exists():
            remove_folder(folder)


def _write_state(folder: Path, record: Record, state: Tree) -> None:
    folder.mkdir()
    save_tree(folder, "state", state)
    # The hash proves that the disk kept what it was given; this proves that it was given the right thing.
    if not is_saved(folder, "state", state):
        raise DamagedError(f"{printable(folder)} does not read back as it was written")
    honour_umask(folder)
    write_manifest(folder, {"format": FORMAT, "format_version": FORMAT_VERSION, "of": record.name})


def _manifest_content(record: Record, earlier: list[Checkpoint]) -> dict[str, Any]:
    # A clock that was set back must not make this save look older than the one before.
    saved_at = max([time.time(), *(c.saved_at + 0.001 for c in earlier)])
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": record.name,
        "saved_at": saved_at,
        **asdict(record),
    }


def _require_space(ckpts: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(ckpts).free
    if free_bytes < wanted_bytes + SPARE_BYTES:
        raise TryLaterError(
            f"{printable(ckpts)} has {free_bytes / 2**30:.2f} GiB free and a checkpoint takes "
            f"{wanted_bytes / 2**30:.2f} GiB. Make room; older checkpoints are left as they are."
        )


def _export_bytes(folder: Path) -> int:
    return sum(int(entry["bytes"]) for entry in read_manifest(folder)["files"].values())


def prune(ckpts: Path, retention: Retention) -> list[Path]:
    """Remove the checkpoints and training states that `retention` does not keep, and return their folders.

    To be called when the newest one has been proven. Averaged (`_ema`) checkpoints are counted by themselves.
    """
    dropped: list[Path] = []
    for ema in (False, True):
        family = [c for c in list_checkpoints(ckpts) if c.record.ema == ema]
        good = [c for c in family if c.good and _complete(c.folder)]
        if not retention.every_state:
            kept = {c.folder for c in [c for c in good if c.has_state][:STATES_KEPT]}
            for c in family:
                if c.has_state and c.folder not in kept and any(newer.saved_at > c.saved_at for newer in good):
                    remove_folder(c.folder / STATE)
                    dropped.append(c.folder / STATE)
        if retention.keep_last_n is not None and len(good) >= GOOD_KEPT:
            oldest = good[: max(GOOD_KEPT, retention.keep_last_n)][-1]
            for c in family:
                if c.saved_at < oldest.saved_at:
                    remove_folder(c.folder)
                    dropped.append(c.folder)
    return dropped


def _complete(folder: Path) -> bool:
    """Whether all files are there in full length: what a look at the names can tell."""
    try:
        verify_folder(folder, skip=STATE, hashes=False)
    except UnreadableError:
        # Nothing may be dropped on the word of a disk that is out of order.
        raise
    except DamagedError:
        return False
    return True
