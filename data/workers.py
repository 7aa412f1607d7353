"""The worker processes that make batches, one epoch after another, and what happens when one of them dies."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import ProcessError
from pickle import UnpicklingError

from torch.utils.data import DataLoader, Sampler

from data.batches import Batch, BatchSource, Lost, Request
from data.item import Update
from utils.errors import UserError, printable
from utils.logs import LOGGER
from utils.seeding import tensor_stream
from utils.stopping import ignore_in_worker, workers_start

# A batch that takes longer is not coming: a disk that is gone, a decoder in a loop.
PATIENCE_SECONDS = 600.0
# So often the loader looks whether its workers are alive.
LOOK_SECONDS = 2.0
MOST_FAILURES = 3
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
        self._pin_memory, self._patience = pin_memory, patience_seconds
        self._queue = _Queue()
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader[Batch]:
        workers, start = self._options.num_workers, self._options.worker_start
        return DataLoader(
            self._source,
            batch_size=None,
            sampler=self._queue,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_in_worker if workers else None,
            multiprocessing_context=None if workers == 0 or start == "auto" else start,
            pin_memory=self._pin_memory,
            timeout=LOOK_SECONDS if workers else 0,
            # Without its own generator, iter(DataLoader) would draw from torch's global one.
            generator=tensor_stream(self._source.seed, "workers"),
        )

    def epoch(self, updates: Sequence[Update], done: int = 0) -> Iterator[Batch]:
        """A batch for each micro-batch of an epoch's `updates`, in order, without the first `done` updates.

        Raises:
            UserError: a picture cannot be decoded and nothing can stand in for it.
            RuntimeError, OSError, ...: workers die again and again on the same batch (`LOST_WORKER`).
        """
        waiting = requests(updates, done)
        failures = 0
        while waiting:
            try:
                iterator = self._start(waiting)
                while waiting:
                    answer = self._next(iterator)
                    if isinstance(answer, Lost):
                        raise UserError(answer.message)
                    waiting = waiting[1:]
                    failures = 0
                    yield answer
            except LOST_WORKER as error:
                if self._options.num_workers == 0 or failures == MOST_FAILURES:
                    raise
                failures += 1
                paths = ", ".join(printable(visit.item.path) for visit in waiting[0].visits)
                LOGGER.warning("workers are started anew (%s); they were due to bring %s", _first_line(error), paths)
                self.close()
                self._loader = self._new_loader()

    def _next(self, iterator: Iterator[Batch | Lost]) -> Batch | Lost:
        """The next answer. The loader looks after its workers whenever its time is up, and may be asked again then.

        Raises:
            RuntimeError: a worker has died, or nothing has come for `patience_seconds`.
        """
        waited = 0.0
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                waited += LOOK_SECONDS
                if "timed out" not in str(error) or waited >= self._patience:
                    raise

    def _start(self, waiting: list[Request]) -> Iterator[Batch | Lost]:
        self._queue.requests = waiting
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        start = self._options.worker_start
        with workers_start(None if start == "auto" else start):
            iterator = iter(self._loader)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # torch's handler raises in the middle of whatever runs when a worker dies, an optimizer's step perhaps.
            # Without it the loss is noticed where the batch is waited for.
            signal.signal(signal.SIGCHLD, handler)
        return iterator

    def close(self) -> None:
        """End the workers without waiting for what they are doing."""
        for child in multiprocessing.active_children():
            child.kill()


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
