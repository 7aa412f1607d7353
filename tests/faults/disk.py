"""Full disks: a limit on the size of files, and a small real file system, at many sizes in the middle of saves."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.faults import save_jobs as jobs
from tests.faults.calls import intact, prepare
from utils import saving
from utils.run_dir import RunDir
from utils.writer import CheckpointWriter

BIG = 4000
"""Rows of the state that does not fit: 128 kB."""


@dataclass
class DiskFigures:
    """Counts over all full disks; `kinds` says as which exceptions they came."""

    full: int = 0
    ended: int = 0
    old_lost: int = 0
    left_behind: int = 0
    next_save_failed: int = 0
    kinds: tuple[str, ...] = ()


def limited_files(root: Path, count: int) -> DiskFigures:
    """Save in the background with no file allowed beyond a limit (RLIMIT_FSIZE), then once more without it."""
    sizes = [1 + (BIG * 32 - 1) * number // count for number in range(count)]
    return _each(root, sizes, _save_under_limit)


def full_file_system(mount: Path, count: int) -> DiskFigures:
    """The same on the small file system `mount`, which a ballast file fills to a different level each time."""
    sizes = [(BIG * 48) * number // count for number in range(count)]
    return _each(mount, sizes, _save_beside_ballast)


def _each(root: Path, sizes: list[int], body: Callable[[RunDir, int], tuple[str, bool]]) -> DiskFigures:
    figures = DiskFigures()
    for size in sizes:
        run = prepare(root / str(size))
        answer = _in_child(lambda tell, run=run, size=size: tell.send(body(run, size)))  # type: ignore[misc]
        figures.full += 1
        figures.ended += answer is None
        if answer is not None:
            figures.kinds = tuple(sorted({*figures.kinds, answer[0]}))
            figures.next_save_failed += not answer[1]
        figures.old_lost += not (intact(run, 1) and intact(run, 2))
        figures.left_behind += any(path.name.startswith(".") for path in run.ckpts.iterdir())
        shutil.rmtree(root / str(size))
    return figures


def _in_child(body: Callable[[Connection], None]) -> tuple[str, bool] | None:
    """What `body` tells from a process of its own, or `None` when it died."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=body, args=(theirs,))
    process.start()
    theirs.close()
    try:
        answer: tuple[str, bool] = ours.recv()
    except EOFError:
        return None
    finally:
        process.join()
    return answer if process.exitcode == 0 else None


def _save_twice(run: RunDir, release: Callable[[], None]) -> tuple[str, bool]:
    """Save 3 (big) while the disk is full, `release`, save 4: the exception of the first, the success of the second."""
    # The check of free space would see a full file system coming; here it must come in the middle.
    saving.SPARE_BYTES = -(2**40)
    with CheckpointWriter(run.ckpts) as writer:
        writer.save(*jobs.save(3, size=BIG))
        first = writer.close()[0]
        release()
        # An errored one, because it takes no states from those that are compared afterwards.
        second = writer.save_now(*jobs.save(4, kind="errored", size=16))[0]
    return type(first.error).__name__, second.error is None


def _save_under_limit(run: RunDir, size: int) -> tuple[str, bool]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return _save_twice(run, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


def _save_beside_ballast(run: RunDir, size: int) -> tuple[str, bool]:
    ballast = run.folder / "ballast"
    free = shutil.disk_usage(run.folder).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free - size))
    return _save_twice(run, ballast.unlink)


@contextmanager
def small_file_system(folder: Path, megabytes: int = 100) -> Iterator[Path | None]:
    """A tmpfs of its own at `folder`, or `None` where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)
