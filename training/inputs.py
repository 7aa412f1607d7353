"""All files that users write for a run, read and checked together: no mistake waits behind another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data.validation_file import ValidationFile, read_validation_file
from utils.config import Options
from utils.errors import Problem, ProblemsError
from utils.optimizer_file import OptimizerFile, load_optimizer_file
from utils.options import Loaded, assemble, collect_options
from utils.prompts import check_samples

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Options and the files they name.

    Args:
        warnings: lines for the log.
    """

    loaded: Loaded
    optimizer: OptimizerFile
    validation: ValidationFile | None
    warnings: tuple[str, ...]

    @property
    def options(self) -> Options:
        """The resolved options."""
        return self.loaded.options


def read_inputs(argv: Sequence[str]) -> Inputs:
    """The checked inputs of a run.

    Raises:
        ProblemsError: every mistake in the flags, the options file, the optimizer file and the validation file.
        SystemExit: after `--help`.
    """
    collected = collect_options(argv)
    problems = list(collected.problems)
    options = assemble(collected.given)
    optimizer = _read(lambda: load_optimizer_file(options.optimizer.optimizer_config), problems)
    path = options.log.validation_config
    validation = None if path is None else _read(lambda: read_validation_file(path), problems)
    if options.sample.sample_prompts != "none":
        _read(lambda: check_samples(options.sample.sample_prompts), problems)
    if problems:
        raise ProblemsError(problems)
    assert optimizer is not None
    loaded = collected.resolve()
    file, warnings = (None, []) if validation is None else validation
    return Inputs(loaded, optimizer, file, (*loaded.warnings, *warnings))


def _read(read: Callable[[], T], problems: list[Problem]) -> T | None:
    try:
        return read()
    except ProblemsError as error:
        problems += error.problems
        return None
