"""Saving beside the training: a copy is taken, a thread writes it, and what became of it is reported."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from utils.checkpoint import Record
from utils.errors import printable
from utils.files import sweep_leftovers
from utils.saving import Retention, save_checkpoint
from utils.tree import Tree, on_cpu, snapshot, tree_bytes

SPARE_MEMORY_BYTES = 2**30

logger = logging.getLogger("emulsion")


@dataclass(frozen=True, slots=True)
class Save:
    """One checkpoint to be written from a state.

    Args:
        exports: writes the Diffusers folder from the state it is given, whose tensors lie on the CPU. That may be a
            copy, written while the training goes on, so it must not look at live weights.
        check: reads the folder back and raises when it differs from the state.
        also: writes other files (the single file) once the checkpoint is safe.
        keep_state: put the state itself into the checkpoint, for an exact resume.
        export_bytes: as for `save_checkpoint`.
    """

    record: Record
    exports: Callable[[Path, Tree], None]
    check: Callable[[Path, Tree], None] | None = None
    also: Callable[[Tree], None] | None = None
    keep_state: bool = True
    export_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What became of one save.

    Args:
        folder: the checkpoint, or `None` when none could be written.
        error: why not, or why `also` failed; `None` when all went well.
        wait_seconds: how long the training stood still for it.
        write_seconds: how long writing, reading back and pruning took.
    """

    record: Record
    folder: Path | None
    error: Exception | None
    wait_seconds: float
    write_seconds: float


class CheckpointWriter:
    """Writes checkpoints into one `ckpts` folder; what a killed run left half done there is swept at the start.

    A failed save is logged and told, and ends nothing: the next one is tried as if nothing had happened. The caller
    holds the lock of the run folder. As a context manager it waits for the last write.
    """

    def __init__(self, ckpts: Path, retention: Retention | None = None) -> None:
        self.ckpts = ckpts
        self.retention = retention
        self._thread: threading.Thread | None = None
        self._results: SimpleQueue[SaveResult] = SimpleQueue()
        for path in sweep_leftovers(ckpts):
            logger.info("removed what a stopped run had left half done: %s", printable(path))

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: Tree, saves: Sequence[Save]) -> None:
        """Copy `state` and return; the checkpoints are written one after another while the training goes on.

        A write under way is waited for first. Where memory does not hold a copy, this returns after the writing.
        """
        started = time.perf_counter()
        self._join()
        if tree_bytes(state) + SPARE_MEMORY_BYTES > available_bytes():
            logger.warning("memory does not hold a copy of the training state: training waits for the whole save")
            self._work(on_cpu(state), saves, started, None)
            return
        copy = snapshot(state)
        waited = time.perf_counter() - started
        self._thread = threading.Thread(target=self._work, args=(copy, saves, started, waited), name="checkpoints")
        self._thread.start()

    def save_now(self, state: Tree, saves: Sequence[Save]) -> list[SaveResult]:
        """Write the checkpoints from `state` itself and return when they are proven, or have failed."""
        started = time.perf_counter()
        self._join()
        return self._write(on_cpu(state), saves, started, None)

    def poll(self) -> list[SaveResult]:
        """What became of the background saves that ended since the last call."""
        done = []
        with suppress(Empty):
            while True:
                done.append(self._results.get_nowait())
        return done

    def close(self) -> list[SaveResult]:
        """Wait for the write under way, if any, and return as `poll` does."""
        self._join()
        return self.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, state: Tree, saves: Sequence[Save], started: float, waited: float | None) -> None:
        for result in self._write(state, saves, started, waited):
            self._results.put(result)

    def _write(self, state: Tree, saves: Sequence[Save], started: float, waited: float | None) -> list[SaveResult]:
        results = []
        for each in saves:
            begun = time.perf_counter()
            folder, error = self._write_one(state, each)
            now = time.perf_counter()
            wait_seconds = now - started if waited is None else waited
            results.append(SaveResult(each.record, folder, error, wait_seconds, now - begun))
            if error is not None:
                lost = "was not saved" if folder is None else "was saved, but not its other files"
                logger.warning("%s %s: %s. The next save is tried.", each.record.name, lost, printable(error))
            # The copy is what the training waited for; a second checkpoint of it costs no more.
            started, waited = now, 0.0 if waited is not None else None
        return results

    def _write_one(self, state: Tree, save: Save) -> tuple[Path | None, Exception | None]:
        folder = None
        try:
            folder = save_checkpoint(
                self.ckpts,
                save.record,
                exports=partial(_with_state, save.exports, state),
                state=state if save.keep_state else None,
                check=None if save.check is None else partial(_with_state, save.check, state),
                retention=self.retention,
                export_bytes=save.export_bytes,
            )
            if save.also is not None:
                save.also(state)
        except Exception as error:  # noqa: BLE001  a full disk comes as OSError, RuntimeError and SafetensorError
            return folder, error
        return folder, None


def _with_state(write: Callable[[Path, Tree], None], state: Tree, folder: Path) -> None:
    write(folder, state)


def available_bytes(system: Path = Path("/")) -> float:
    """Memory that can be had without swapping or being killed for it; infinite where the system does not tell.

    A container's limit is the tighter of two: what the machine has free is not what a process in it may take.
    """
    free = [math.inf]
    with suppress(OSError):
        for line in (system / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024.0)
    groups = system / "sys/fs/cgroup"
    for limit, used, reclaimable in (
        (groups / "memory.max", groups / "memory.current", "inactive_file"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        # "max" is no number: there is no limit. Pages of files that nobody uses are counted as used, but yield.
        with suppress(OSError, ValueError):
            free.append(float(int(limit.read_text()) - int(used.read_text()) + _entry(limit.parent, reclaimable)))
    return max(0.0, min(free))


def _entry(group: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
    return 0
