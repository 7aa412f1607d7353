"""All files that users write for a run, read and checked together: no mistake waits behind another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import ProblemsError
from utils.optimizer_file import OptimizerFile, load_optimizer_file
from utils.options import Loaded, assemble, collect_options


@dataclass(frozen=True, slots=True)
class Inputs:
    """Options and the files they name."""

    loaded: Loaded
    optimizer: OptimizerFile


def read_inputs(argv: Sequence[str]) -> Inputs:
    """The checked inputs of a run.

    Raises:
        ProblemsError: every mistake in the flags, the options file and the optimizer file.
        SystemExit: after `--help`.
    """
    collected = collect_options(argv)
    problems = list(collected.problems)
    optimizer = OptimizerFile()
    try:
        optimizer = load_optimizer_file(assemble(collected.given).optimizer.optimizer_config)
    except ProblemsError as error:
        problems += error.problems
    if problems:
        raise ProblemsError(problems)
    return Inputs(collected.resolve(), optimizer)
