"""The control file: words that a user writes into the run folder to steer a running job."""

from __future__ import annotations

import logging
import stat
import time
from pathlib import Path
from typing import Literal, get_args

from utils.errors import printable

Command = Literal["save", "sample", "validate", "pause", "resume", "stop"]

_COMMANDS: tuple[Command, ...] = get_args(Command)
_LIMIT = 4096
_EMPTY_SECONDS = 5.0

logger = logging.getLogger("emulsion")


class ControlFile:
    """Reads and removes the file `control` of a run folder, e.g. after `echo save sample > control`.

    The words are `save`, `sample`, `validate`, `pause` (until `resume` or another word comes) and `stop` (as Ctrl-C).
    Nothing that is wrong with the file ends a run: it is logged once and left alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left_alone: tuple[int, int] | None = None

    def poll(self) -> list[Command]:
        """The commands given since the last call, in order; one `stat` when there are none."""
        try:
            status = self.path.lstat()
        except OSError:
            return []
        identity = (status.st_ino, status.st_mtime_ns)
        if identity == self._left_alone or not self._readable(status.st_mode, status.st_size, status.st_mtime):
            return []
        try:
            words = self.path.read_bytes()[:_LIMIT].decode("utf-8", "replace").lower().split()
            self.path.unlink()
        except OSError as error:
            # What cannot be removed would be obeyed again at every update.
            self._left_alone = identity
            logger.warning("%s cannot be read and removed: %s", printable(self.path), printable(error))
            return []
        return [command for word in words if (command := self._command(word)) is not None]

    def wait(self, seconds: float = 1.0) -> list[Command]:
        """As `poll`, after a rest: for the loop of a paused run."""
        time.sleep(seconds)
        return self.poll()

    def _readable(self, mode: int, size: int, changed: float) -> bool:
        # `echo save > control` makes an empty file first; opening a FIFO would wait for ever.
        return stat.S_ISREG(mode) and (size > 0 or time.time() - changed > _EMPTY_SECONDS)

    def _command(self, word: str) -> Command | None:
        for command in _COMMANDS:
            if word == command:
                logger.info("control file: %s", command)
                return command
        logger.warning("control file: %s is none of %s", printable(repr(word[:40])), ", ".join(_COMMANDS))
        return None
