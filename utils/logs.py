"""The one logger and where its lines go: the console, in colour only on a terminal, and the log file of the run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from utils.errors import printable

LOGGER = logging.getLogger("emulsion")
FILE_ONLY = {"file_only": True}

_RETRY_SECONDS = 60.0
_COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}
_WORDS = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


def occupy_standard_streams() -> None:
    """Let every standard stream that is closed lead nowhere.

    The next file to be opened, a checkpoint perhaps, would get its number, and what libraries print would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def open_console(stream: TextIO | None = None) -> None:
    """Send the logger's lines to `stream` (default: stdout) in place of any earlier console."""
    _remove(ConsoleHandler)
    LOGGER.propagate = False
    # Where Diffusers imports it, it warns of kernels for 4-bit networks, which nobody here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    LOGGER.setLevel(logging.INFO)
    target = sys.stdout if stream is None else stream
    if target is not None:  # a program started without a stdout has None there
        LOGGER.addHandler(ConsoleHandler(target))
    if not any(isinstance(handler, LogFileHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(LogFileHandler())


def open_log_file(path: Path) -> None:
    """Append the logger's lines to `path`, also those that were logged since `open_console`."""
    for handler in LOGGER.handlers:
        if isinstance(handler, LogFileHandler):
            handler.open(path)
            return
    handler = LogFileHandler()
    handler.open(path)
    LOGGER.addHandler(handler)


def close_logs() -> None:
    """Detach the console and the log file; a later `open_console` starts afresh."""
    _remove(ConsoleHandler)
    _remove(LogFileHandler)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches `stream` on a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def append_whole(path: Path, data: bytes) -> None:
    """Add `data` to the end of `path`, all of it or nothing: a full disk must leave no half line behind.

    Raises `OSError`. The file is opened anew each time: nothing is lost in buffers, forked workers share no handle.
    """
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(28, "No space left on device", str(path))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def escape_lines(text: str) -> str:
    """`text` with its line breaks kept and everything else that could confuse a terminal escaped."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _message(record: logging.LogRecord) -> str:
    """The message, with arguments escaped by themselves: a caption cannot forge a second line."""
    if isinstance(record.args, tuple):
        record.args = tuple(printable(arg) if isinstance(arg, str | Path) else arg for arg in record.args)
    text = escape_lines(record.getMessage())
    if record.exc_info:
        text += "\n" + escape_lines(logging.Formatter().formatException(record.exc_info))
    return text


class ConsoleHandler(logging.Handler):
    """Writes lines above the progress bar; a console that fails is left alone, never the end of a run."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self._told = False
        self._colour = is_terminal(stream) and "NO_COLOR" not in os.environ and _knows_colour()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless it is meant for the log file only."""
        if getattr(record, "file_only", False):
            return
        text = _WORDS.get(record.levelno, "") + _message(record)
        if self._colour and record.levelno in _COLOURS:
            text = f"{_COLOURS[record.levelno]}{text}\033[0m"
        try:
            write_line(self.stream, text)
        except (OSError, ValueError) as error:
            silence(self.stream, error)
            if not self._told:
                self._told = True
                LOGGER.warning("the console cannot be written (%s); the log file goes on", error, extra=FILE_ONLY)


def write_line(stream: TextIO, text: str) -> None:
    """Write a line to `stream`, above any progress bar, with what its encoding lacks escaped."""
    from tqdm import tqdm

    encoding = getattr(stream, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


def silence(stream: TextIO, error: Exception) -> None:
    """After a broken pipe, let `stream` lead nowhere: Python's own flush at exit would turn exit code 0 into 120."""
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class LogFileHandler(logging.Handler):
    """Appends lines with their time; keeps them in memory until the file is known, or while the disk refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._waiting: deque[str] = deque(maxlen=10_000)
        self._retry_at = 0.0
        self._told = False

    def open(self, path: Path) -> None:
        """Write to `path` from now on, first what has waited."""
        self._path = path
        self._flush_waiting()

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record, or keep it for later."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        self._waiting.append(f"{stamp} {record.levelname:<7} {_message(record)}\n")
        if self._path is not None and time.monotonic() >= self._retry_at:
            self._flush_waiting()

    def _flush_waiting(self) -> None:
        if self._path is None or not self._waiting:
            return
        try:
            append_whole(self._path, "".join(self._waiting).encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if not self._told:
                self._told = True
                LOGGER.warning("the log file cannot be written (%s); its lines wait in memory", error)
        else:
            self._waiting.clear()
            self._retry_at = 0.0


def _knows_colour() -> bool:
    return sys.platform != "win32" or "WT_SESSION" in os.environ or "ANSICON" in os.environ


def _remove(kind: type[logging.Handler]) -> None:
    for handler in list(LOGGER.handlers):
        if isinstance(handler, kind):
            LOGGER.removeHandler(handler)
            handler.close()


def log_once(seen: set[Any], key: Any, message: str, *args: object) -> None:
    """Warn with `message`, the first time that `key` comes up in `seen`."""
    if key not in seen:
        seen.add(key)
        LOGGER.warning(message, *args)
