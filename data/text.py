"""Text files of strangers: captions and settings as characters, whatever they are encoded in."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

MAX_BYTES = 1 << 20
# Not blocking: a pipe that got past all checks must not hold the program.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_BLOCK = 1 << 12
FOREIGN = "is neither UTF-8 nor UTF-16; read as cp1252, please check its letters"


class BrokenFileError(Exception):
    """A caption or settings file that cannot be understood; the text names the file, the line and the reason."""

    def __init__(self, path: str, line: int | None, reason: str) -> None:
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {reason}")
        self.path, self.line, self.reason = path, line, reason

    @property
    def place(self) -> str:
        """The name of the file and the line, without the folder."""
        return f"{Path(self.path).name}{'' if self.line is None else f', line {self.line}'}"


def read_text(path: str) -> tuple[str, str | None]:
    """The text of the file and, if its encoding had to be guessed, a warning.

    UTF-8 with or without byte order mark, UTF-16 with one, else cp1252.

    Raises:
        BrokenFileError: it cannot be opened, or is longer than a megabyte and so no caption.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
        try:
            raw = os.read(descriptor, _BLOCK)
            if len(raw) == _BLOCK:
                raw += os.read(descriptor, MAX_BYTES + 1 - _BLOCK)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BrokenFileError(path, None, f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise BrokenFileError(path, None, "is larger than 1 MiB: too long for a text that goes with a picture")
    return decode_text(raw)


def decode_text(raw: bytes) -> tuple[str, str | None]:
    """The characters of `raw` without mark and NULs, and a warning if the encoding had to be guessed."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", "replace").replace("\0", ""), None
    try:
        return raw.decode("utf-8-sig").replace("\0", ""), None
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace").replace("\0", ""), FOREIGN


def without_surrogates(text: str) -> str:
    """`text` with `?` for every half character, as file names and JSON may hold them: no tokenizer takes those."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
