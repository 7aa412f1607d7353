"""What the user can mend: the errors that end a run with words instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EXIT_DONE = 0
EXIT_USER = 2
EXIT_MEMORY = 3
EXIT_TRY_LATER = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """Something the user can mend: what happened, with the value, then what to do about it.

    `train.py` prints it without a traceback and exits with `exit_code`.
    """

    exit_code = EXIT_USER


class OutOfMemoryError(UserError):
    """The job does not fit into the memory of the device (exit code 3)."""

    exit_code = EXIT_MEMORY


class TryLaterError(UserError):
    """The machine, not the user's options, is in the way: a full disk, a busy folder (exit code 75)."""

    exit_code = EXIT_TRY_LATER


def printable(value: object) -> str:
    """`value` as text that any terminal, log or JSON file can take (no control characters, no lone surrogates)."""
    text = str(value)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the user's input.

    Args:
        where: the file, or "command line".
        key: the option or key, empty when the whole file is meant.
        value: the value as given; `None` is not shown.
        remedy: what is wrong and what to do about it, as a sentence.
    """

    where: str
    key: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (printable(self.where), printable(self.key)) if part)
        shown = "" if self.value is None else f" = {printable(repr(self.value))}"
        return f"{place}{shown}: {self.remedy}"


class ProblemsError(UserError):
    """Every mistake that was found, at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head}:", *(f"  {problem}" for problem in self.problems)]))
