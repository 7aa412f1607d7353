"""Files and folders that exist whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
REPLACED = ".replaced"


def sync_file(path: Path) -> None:
    """Return when the bytes of `path` are on the disk, not only in the machine's memory."""
    # Windows flushes only handles that may write.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names inside `path` are on the disk (Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`folder` and each folder below it with its files, deepest first; raises what the disk raises.

    `Path.rglob` passes over folders that cannot be read, and their files would silently be left out.
    """

    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, topdown=False, onerror=fail):
        folders.sort()
        yield Path(root), [Path(root, name) for name in sorted(files)]


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, and `folder` itself."""
    for each, files in walk(folder):
        for file in files:
            sync_file(file)
        sync_folder(each)


def rename(old: Path, new: Path) -> None:
    """Give `old` the name `new`; a file there is replaced, a folder there must be empty."""
    for attempt in range(5):
        try:
            os.replace(old, new)  # noqa: PTH105  one call to watch, for files and folders alike
            return
        except PermissionError:
            # On Windows a virus scanner may hold a fresh file for a moment.
            if os.name != "nt" or attempt == 4:
                raise
            time.sleep(0.1 * 2**attempt)


def partial_path(path: Path, owner: str = "") -> Path:
    """The hidden sibling under which `path` is written; `owner` tells apart runs that share a folder."""
    return path.with_name(f".{path.name}{'.' if owner else ''}{owner}{PARTIAL}")


@contextmanager
def atomic_file(path: Path, owner: str = "") -> Iterator[Path]:
    """A path to write to; when the block ends well its file, synced, becomes `path`; otherwise nothing is left."""
    partial = partial_path(path, owner)
    try:
        # A run that was killed may have left one.
        partial.unlink(missing_ok=True)
        yield partial
        honour_umask(partial)
        sync_file(partial)
        rename(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as partial, partial.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def honour_umask(path: Path) -> None:
    """Give `path`, a file or all files below a folder, the mode that `open` would give it (safetensors writes 0600)."""
    if os.name == "nt":
        return
    mode = 0o666 & ~_umask()
    for file in [path] if path.is_file() else [file for _, files in walk(path) for file in files]:
        if not file.is_symlink():
            file.chmod(mode)


def _umask() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    # Elsewhere asking means changing it, for all threads, for a moment; the strict way round.
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def remove_folder(folder: Path) -> None:
    """Remove `folder` so that a crash in the middle leaves no half folder under its name."""
    if not is_leftover(folder):
        aside = partial_path(folder)
        if aside.exists():
            shutil.rmtree(aside)
        rename(folder, aside)
        folder = aside
    shutil.rmtree(folder)


def is_leftover(path: Path) -> bool:
    """Whether `path` has the name of something half written or half removed."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, REPLACED))


def replace_folder(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder`; an older `folder` is put aside first and removed by `drop_replaced`."""
    if folder.exists():
        aside = _replaced_path(folder)
        if aside.exists():
            shutil.rmtree(aside)
        rename(folder, aside)
    rename(new, folder)
    sync_folder(folder.parent)


def drop_replaced(folder: Path) -> None:
    """Remove what `replace_folder` put aside for `folder`, now that the new one is proven."""
    aside = _replaced_path(folder)
    if aside.exists():
        shutil.rmtree(aside)


def restore_replaced(folder: Path) -> bool:
    """Put back what `replace_folder` put aside, if `folder` itself is missing; whether there was such a thing."""
    aside = _replaced_path(folder)
    if folder.exists() or not aside.exists():
        return False
    rename(aside, folder)
    sync_folder(folder.parent)
    return True


def restore_all_replaced(parent: Path) -> None:
    """`restore_replaced` for every folder in `parent`: undoes a crash between the two renames of a replacement."""
    for entry in sorted(parent.glob(f".*{REPLACED}")):
        restore_replaced(parent / entry.name[1 : -len(REPLACED)])


def sweep_leftovers(parent: Path, owner: str = "") -> list[Path]:
    """Remove what a killed run left half done below `parent`, and return its paths.

    Only for folders that this run has to itself (locked), or with the `owner` of the run's own partial files.
    """
    if not owner:
        restore_all_replaced(parent)
    swept = []
    for entry in sorted(parent.glob(".*")):
        ours = entry.name.endswith(f".{owner}{PARTIAL}") if owner else is_leftover(entry)
        if ours:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            swept.append(entry)
    return swept


def _replaced_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")
