"""Ctrl-C, SIGTERM and other wishes to stop: a flag that the loop reads between updates."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Literal, Self

from utils.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

Reason = Literal["interrupted", "terminated"]

# From linux/prctl.h: the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG = 1
_HANG_UP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))  # not on Windows
_TERMINATING = (signal.SIGTERM, *_HANG_UP)

# Parents such as `make` or `accelerate launch` pass a Ctrl-C on that the terminal has sent to everybody already.
ECHO_SECONDS = 0.2
_ADVICE = b"\nStopping: the update in hand is finished, then everything is saved. Ctrl-C again stops at once.\n"
_NOTHING = b"\nStopped: there was nothing to save yet.\n"


class CutOff(BaseException):
    """What is under way, a sample or an update that cannot go on, is left because a stop is asked for."""


class StopSignal:
    """While entered, the first SIGINT, SIGTERM or SIGHUP (Windows: also Ctrl-Break) only sets `requested`.

    SIGHUP comes when the terminal is closed; a run that was started with nohup is deaf to it and stays so.

    A second Ctrl-C ends the process and its children at once, with exit code 130; files are atomic, so nothing is
    harmed. Other handlers come back on leaving. Outside the main thread, where Python allows no handlers, only
    `request` works.

    Args:
        at_once: while there is nothing to save; then the first signal ends the process as the second Ctrl-C does. A
            scan of a slow disk or a download must not be waited for.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.requested: Reason | None = None
        self._interrupts = 0
        self._interrupted_at = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int | None:
        """130 after Ctrl-C, 143 after SIGTERM, `None` when nobody asked to stop."""
        if self.requested is None:
            return None
        return EXIT_INTERRUPTED if self.requested == "interrupted" else EXIT_TERMINATED

    def request(self, reason: Reason = "interrupted") -> None:
        """Ask for a stop as a signal would; the first reason stands."""
        if self.requested is None:
            self.requested = reason

    def __bool__(self) -> bool:
        return self.requested is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _stop_signals():
                if not (number in _HANG_UP and signal.getsignal(number) == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # `None` stands for a handler that was not set from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A forked worker inherits the handler until it has set its own.
        if os.getpid() != self._pid:
            return
        if self.at_once:
            with suppress(OSError):
                os.write(2, _NOTHING)
            stop_at_once(EXIT_TERMINATED if number in _TERMINATING else EXIT_INTERRUPTED)
        if number in _TERMINATING:
            # Schedulers send it to the process and again to its group; only a person at the keyboard hurries.
            self.request("terminated")
            return
        now = time.monotonic()
        self._interrupts += 1
        if self._interrupts == 1:
            self._interrupted_at = now
            self.request("interrupted")
            # print and logging may be what the signal has interrupted; they must not be entered twice.
            with suppress(OSError):
                os.write(2, _ADVICE)
        elif now - self._interrupted_at > ECHO_SECONDS:
            stop_at_once()


def stop_at_once(exit_code: int = EXIT_INTERRUPTED) -> None:
    """Kill the child processes and end this one, without waiting for threads, files or libraries."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(exit_code)


def _stop_signals() -> list[signal.Signals]:
    numbers = [signal.SIGINT, *_TERMINATING]
    if hasattr(signal, "SIGBREAK"):
        numbers.append(signal.SIGBREAK)
    return numbers


def begin_worker(parent: int, _worker_id: int = 0) -> None:
    """Make this worker process deaf to what stops a run, and end it with its `parent`, the main process.

    A terminal and a scheduler signal the whole group; workers that die first would take the update in hand with them.
    """
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _stop_signals())
    if sys.platform == "linux":
        # A loader's own watch sees when the parent changes, between two batches: it does not end a worker that hangs,
        # nor one whose parent was killed before the watch began.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(EXIT_TERMINATED)


@contextmanager
def workers_start(method: str | None = None) -> Iterator[None]:
    """Start worker processes inside this block: they are deaf from birth, and no signal to this process is lost.

    Blocked signals are inherited, so a signal that comes before a worker reaches `begin_worker` waits there.
    `method` is how they are started ("fork", "spawn"); `None` is the way of this platform.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if (multiprocessing.get_start_method() if method is None else method) != "fork":
        # The first spawn starts this helper, which unblocks the signals again; it must be there before.
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
