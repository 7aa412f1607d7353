"""The order in which one save touches the disk: sync, manifest, sync, rename, sync of the parent, read back, drop."""

from __future__ import annotations

from pathlib import Path

from tests.faults import save_jobs as jobs
from tests.faults.calls import Watch, prepare, watching
from utils.manifest import MANIFEST
from utils.saving import Retention
from utils.writer import CheckpointWriter

Calls = list[tuple[str, Path]]


def watched_save(root: Path) -> tuple[Path, Calls]:
    """The calls of a third save that drops the first checkpoint, and the folder it made."""
    run = prepare(root)
    writer = CheckpointWriter(run.ckpts, Retention(keep_last_n=2))
    with watching(Watch(run.ckpts)) as watch:
        result = writer.save_now(*jobs.save(3, size=16))[0]
    assert result.error is None
    assert result.folder is not None
    return result.folder, watch.calls


def violations(folder: Path, calls: Calls) -> list[str]:
    """What in `calls` breaks the promise that a crash at any moment leaves either the old state or the new."""
    partial = folder.with_name(f".{folder.name}.partial")
    named = _first(calls, ("rename", folder))
    dropped = min((at for at, (kind, path) in enumerate(calls) if _drops(kind, path, folder)), default=len(calls))
    wrong = []
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = _first(calls, ("write", partial / MANIFEST))
    for file in files:
        synced = _last(calls, ("sync", partial / file))
        if synced == -1:
            wrong.append(f"{file} is never synced")
        elif file.as_posix() != MANIFEST and synced > manifest:
            wrong.append(f"{file} is synced after the manifest was begun")
        elif synced > named:
            wrong.append(f"{file} is synced after the rename")
        if ("read", folder / file) not in calls[named:dropped]:
            wrong.append(f"{file} is not read back between the rename and the removal of older ones")
    for inner in {partial / file.parent for file in files}:
        if not -1 < _last(calls, ("sync", inner)) < named:
            wrong.append(f"the names in {inner.name} are not synced before the rename")
    if not named < _first(calls, ("sync", folder.parent)) < dropped:
        wrong.append("the new name is not synced before older ones go")
    return wrong


def _drops(kind: str, path: Path, folder: Path) -> bool:
    """Whether a call takes something from an older checkpoint."""
    older = path.relative_to(folder.parent).parts[:1]
    ours = (folder.name, f".{folder.name}.partial")
    return kind in ("rename", "remove", "rmdir") and bool(older) and older[0] not in ours


def _first(calls: Calls, call: tuple[str, Path]) -> int:
    return calls.index(call) if call in calls else len(calls)


def _last(calls: Calls, call: tuple[str, Path]) -> int:
    return max((at for at, each in enumerate(calls) if each == call), default=-1)
