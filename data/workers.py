"""The worker processes that make batches, one epoch after another, and what happens when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import ProcessError
from multiprocessing.process import BaseProcess
from pickle import UnpicklingError
from typing import Any

from torch.utils.data import DataLoader, Sampler

from data.batches import Batch, BatchSource, Lost, Request
from data.culprits import SECONDS, find_culprits
from data.item import Update
from utils.errors import TryLaterError, UserError, printable
from utils.logs import LOGGER
from utils.seeding import tensor_stream
from utils.stopping import StopSignal, begin_worker, workers_start

# A batch that takes longer is not coming: a disk that is gone, a decoder in a loop.
PATIENCE_SECONDS = 600.0
# So often the loader looks whether its workers are alive.
LOOK_SECONDS = 2.0
# When a stop is asked for: the update that waits is left then, and trained when the run goes on.
STOP_PATIENCE_SECONDS = 4.0
# A worker that is to end may finish the picture it is reading.
GRACE_SECONDS = 2.0
# Batches that each worker makes ahead.
PREFETCH = 2
# Failures at the same batch, after which its pictures are looked at one by one, and after which the run ends.
SUSPICIOUS = 2
MOST_FAILURES = 3
# What the loader says of an exception that a worker lived to tell.
_RAISED = "in DataLoader worker process"
# The loader speaks of a dead worker as RuntimeError. One that died after it had announced a batch, and before its
# tensors were fetched from it, is a connection that breaks, in any of these ways.
LOST_WORKER = (RuntimeError, OSError, EOFError, UnpicklingError, ProcessError)


class _Queue(Sampler[Request]):
    """The requests of the coming epoch."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class Batches:
    """The batches of one epoch after another, from workers that live as long as the run.

    A worker that dies or hangs costs time and changes nothing: new ones start at the first batch that is missing.
    """

    def __init__(
        self, source: BatchSource, *, pin_memory: bool = False, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._source, self._options = source, source.options
        # `None` is the way of this platform.
        self._start_method = None if source.options.worker_start == "auto" else source.options.worker_start
        self._pin_memory, self._patience = pin_memory, patience_seconds
        self._queue = _Queue()
        self._loader: DataLoader[Batch] | None = None
        self._iterator: Any = None
        self._workers: list[BaseProcess] = []

    def _new_loader(self) -> DataLoader[Batch]:
        workers = self._options.num_workers
        return DataLoader(
            self._source,
            batch_size=None,
            sampler=self._queue,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=partial(begin_worker, os.getpid()) if workers else None,
            multiprocessing_context=self._start_method if workers else None,
            pin_memory=self._pin_memory,
            prefetch_factor=PREFETCH if workers else None,
            timeout=LOOK_SECONDS if workers else 0,
            # Without its own generator, iter(DataLoader) would draw from torch's global one.
            generator=tensor_stream(self._source.seed, "workers"),
        )

    def epoch(self, updates: Sequence[Update], done: int = 0, stop: StopSignal | None = None) -> Iterator[Batch]:
        """A batch for each micro-batch of an epoch's `updates`, in order, without the first `done` updates.

        Args:
            stop: once it is asked for, a batch is waited for no longer than `STOP_PATIENCE_SECONDS`.

        Raises:
            UserError: a picture cannot be decoded and nothing can stand in for it.
            TryLaterError: workers die or hang again and again on the same batch, whose pictures are not to blame.
            RuntimeError, OSError, ...: a stop is asked for and a worker has died or does not answer (`LOST_WORKER`);
                or making the batch raises this.
        """
        waiting = requests(updates, done)
        failures = 0
        while waiting:
            try:
                self._start(waiting)
                while waiting:
                    answer = self._next(stop)
                    if isinstance(answer, Lost):
                        raise UserError(answer.message)
                    waiting = waiting[1:]
                    failures = 0
                    yield answer
                return
            except LOST_WORKER as error:
                if self._options.num_workers == 0 or stop or (failures == MOST_FAILURES and _RAISED in str(error)):
                    raise
                reason = _first_line(error)
            failures += 1
            self._begin_anew(waiting, failures, reason, stop)

    def _begin_anew(self, waiting: list[Request], failures: int, reason: str, stop: StopSignal | None) -> None:
        """Have new workers begin with the first batch that is `waiting`, for the `failures`-th time."""
        # Not while the error is at hand, which refers to all that is to go.
        self._abandon()
        paths = ", ".join(printable(visit.item.path) for visit in waiting[0].visits)
        if failures > MOST_FAILURES:
            raise TryLaterError(
                f"{failures} times in a row workers died or brought nothing ({reason}), due to bring {paths}; "
                "if memory is short, fewer --num_workers need less (0: the training process reads the pictures)"
            )
        LOGGER.warning("workers are started anew (%s); they were due to bring %s", reason, paths)
        if failures == SUSPICIOUS:
            # Workers work ahead, so the picture may be one of a later batch.
            begun = waiting[: self._options.num_workers * PREFETCH]
            visits = [visit for request in begun for visit in request.visits]
            seconds = min(SECONDS, self._patience)
            found = find_culprits(self._source, visits, start=self._start_method, seconds=seconds, stop=stop)
            self._source.dangerous |= found

    def _start(self, waiting: list[Request]) -> None:
        self._queue.requests = waiting
        others = multiprocessing.active_children()
        is_new = self._loader is None
        self._loader = self._new_loader() if self._loader is None else self._loader
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        with workers_start(self._start_method), _deaths_interrupt(self._workers):
            self._iterator = iter(self._loader)
        if is_new:
            # Earlier ones that were killed may still be on their way out.
            self._workers = [child for child in multiprocessing.active_children() if child not in others]
        if handler is not None and threading.current_thread() is threading.main_thread():
            # torch's handler raises in the middle of whatever runs when a worker dies, an optimizer's step perhaps.
            signal.signal(signal.SIGCHLD, handler)

    def _next(self, stop: StopSignal | None) -> Batch | Lost:
        """The next answer. The loader looks after its workers whenever its time is up, and may be asked again then.

        Raises:
            RuntimeError: a worker has died, or nothing has come for as long as it is waited for.
        """
        waited = stopping = 0.0
        while True:
            try:
                with _deaths_interrupt(self._workers):
                    answer: Batch | Lost = next(self._iterator)
                    return answer
            except RuntimeError as error:
                waited += LOOK_SECONDS
                stopping += LOOK_SECONDS if stop else 0.0
                if "timed out" not in str(error) or waited >= self._patience or stopping >= STOP_PATIENCE_SECONDS:
                    raise

    def close(self) -> None:
        """End the workers. One that is busy, or hangs, is killed when its time is up."""
        if not all(worker.is_alive() for worker in self._workers):
            self._abandon()
            return
        late = threading.Timer(GRACE_SECONDS, self._kill)
        late.start()
        # torch ends them when nothing refers to this any more, and waits for each.
        self._loader = self._iterator = None
        late.cancel()
        # An error that is under way may still refer to it.
        self._kill()
        self._workers = []

    def _abandon(self) -> None:
        """Kill the workers and wait for nothing: locks that the loader shares with them may be held by the dead."""
        self._kill()
        if self._pin_memory and self._iterator is not None:
            # The loader would send something through the workers' queue, and the program wait for that at its end.
            self._iterator._worker_result_queue.cancel_join_thread()
        last = [self._iterator]
        self._loader = self._iterator = None
        self._workers = []
        threading.Thread(target=last.clear, daemon=True).start()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()


@contextmanager
def _deaths_interrupt(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Inside this block the death of one of `workers` raises RuntimeError at once, whatever is waited for.

    One that dies with half a message sent would leave the loader waiting for the other half without end, as other
    workers hold the same pipe. (Windows knows no half messages, and no SIGCHLD.)
    """
    if not workers or not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    inside = True
    before = signal.getsignal(signal.SIGCHLD)

    def look(*arguments: Any) -> None:
        nonlocal inside
        if arguments and callable(before):
            before(*arguments)
        dead = [str(worker.pid) for worker in workers if not worker.is_alive()]
        if inside and dead:
            # Once only: this may come in the way of `finally`, too.
            inside = False
            raise RuntimeError(f"worker {', '.join(dead)} has died")

    signal.signal(signal.SIGCHLD, look)
    try:
        look()
        yield
    finally:
        inside = False
        signal.signal(signal.SIGCHLD, before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def requests(updates: Sequence[Update], done: int = 0) -> list[Request]:
    """What to ask the workers for, a request a micro-batch, once `done` updates of the epoch are trained."""
    asked = []
    for number, update in enumerate(updates[done:], start=done):
        first = 0
        for micro_batch in update.micro_batches:
            asked.append(Request(micro_batch, number, first, update.images))
            first += len(micro_batch.visits)
    return asked
