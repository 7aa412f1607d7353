"""System calls watched and made to fail: the n-th open, rename, sync, and so on, of a save; and full disks."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import save_jobs as jobs
from utils.checkpoint import list_checkpoints, load_training_state, prove
from utils.run_dir import RunDir, create_run_dir
from utils.saving import Retention
from utils.tree import same_tree
from utils.writer import CheckpointWriter

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


@dataclass
class Watch:
    """Calls below `root`, in order, as (kind, path); `fail_at` is the number of the call that fails, from 0."""

    root: Path
    fail_at: int | None = None
    error: int = errno.EIO
    calls: list[tuple[str, Path]] = field(default_factory=list)

    def note(self, kind: str, path: Any) -> None:
        try:
            where = Path(os.fsdecode(path))
        except TypeError:
            return
        if self.root in where.parents or where == self.root:
            self.calls.append((kind, where))
            if len(self.calls) - 1 == self.fail_at:
                raise OSError(self.error, os.strerror(self.error), str(where))


_active: Watch | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None or event not in WATCHED:
        return
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        _active.note("write" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "read", arguments[0])
    else:
        # A rename is noted by what appears.
        _active.note(event.removeprefix("os."), arguments[1] if event == "os.rename" else arguments[0])


_hooked: list[bool] = []


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Note and, where asked, fail the calls that Python makes inside the block."""
    global _active
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        watch.note("sync", Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    _active = watch
    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield watch
    finally:
        _active = None
        os.fsync = real


@dataclass
class CallFigures:
    """Counts over all injected failures; `kinds` says how often which call failed."""

    injected: int = 0
    old_lost: int = 0
    half_visible: int = 0
    next_save_failed: int = 0
    left_behind: int = 0
    survived: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


def prepare(root: Path) -> RunDir:
    """A run folder with two good checkpoints."""
    run = create_run_dir(root, jobs.PROJECT)
    writer = CheckpointWriter(run.ckpts)
    for update in (1, 2):
        assert writer.save_now(*jobs.save(update, size=16))[0].error is None
    return run


def intact(run: RunDir, update: int) -> bool:
    """Whether the checkpoint of `update` is whole and holds what was saved."""
    try:
        folder = run.ckpts / jobs.record(update).name
        prove(folder, from_disk=False)
        return same_tree(load_training_state(folder), jobs.state(update, 16))
    except Exception:
        return False


def fail_every_call(new_root: Callable[[], Path], *, step: int = 1, error: int = errno.EIO) -> CallFigures:
    """Let each call of one save fail once, every `step`-th of them, each time on a fresh run folder."""
    figures, number = CallFigures(), 0
    while True:
        run = prepare(new_root())
        writer = CheckpointWriter(run.ckpts, Retention(keep_last_n=2))
        with watching(Watch(run.ckpts, fail_at=number, error=error)) as watch:
            result = writer.save_now(*jobs.save(3, size=16))[0]
        if len(watch.calls) <= number:
            assert result.error is None
            return figures
        kind = watch.calls[number][0]
        figures.kinds[kind] = figures.kinds.get(kind, 0) + 1
        figures.injected += 1
        figures.survived += result.error is None
        figures.old_lost += not (intact(run, 2) and (intact(run, 1) or intact(run, 3)))
        visible = {c.record.progress.update for c in list_checkpoints(run.ckpts)}
        figures.half_visible += any(not intact(run, update) for update in visible - {1})
        if result.error is not None:
            figures.left_behind += any(path.name.startswith(".") for path in run.ckpts.iterdir())
        later = CheckpointWriter(run.ckpts, Retention(keep_last_n=2)).save_now(*jobs.save(4, size=16))[0]
        figures.next_save_failed += later.error is not None or not intact(run, 4)
        number += step
