"""How options are found: the command line over the JSON file over the defaults, every mistake reported at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import OBSOLETE, SECTIONS, Options
from utils.errors import Problem, ProblemsError, UserError
from utils.run_dir import project_name_problem
from utils.schema import build_parser, nearest, option_fields, parse_command_line, read_values

DESCRIPTION = "Fine-tune Stable Diffusion on folders of captioned pictures."


@dataclass(frozen=True, slots=True)
class Loaded:
    """Options with where they came from.

    Args:
        given: the values that the user gave, by name, the command line over the file.
        flags: the part of `given` that came from the command line; it keeps winning when the file is read again.
        warnings: a line each, to be logged.
    """

    options: Options
    given: Mapping[str, Any]
    flags: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """Options as far as they could be read, and everything that is wrong with them."""

    given: Mapping[str, Any]
    flags: Mapping[str, Any]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]

    def resolve(self) -> Loaded:
        """The options.

        Raises:
            ProblemsError: with every problem of the command line and the file.
        """
        if self.problems:
            raise ProblemsError(self.problems)
        return Loaded(assemble(self.given), self.given, self.flags, self.warnings)


def collect_options(argv: Sequence[str]) -> Collected:
    """What flags and the JSON file say; raises nothing but `SystemExit`, after `--help`."""
    sections = list(SECTIONS.values())
    parser = build_parser(sections, "train.py", DESCRIPTION)
    flags, problems = parse_command_line(parser, sections, argv, OBSOLETE)
    path = Path(flags.get("config", "train.json"))
    from_file: dict[str, Any] = {}
    given_flags = {word.partition("=")[0] for word in argv}
    warnings = [_obsolete("command line", name) for name in OBSOLETE if f"--{name}" in given_flags]
    if "config" in flags or path.exists():
        try:
            raw = read_json_object(path)
        except ProblemsError as error:
            problems += error.problems
        else:
            from_file, file_problems, file_warnings = check_file(raw, str(path))
            problems += file_problems
            warnings += file_warnings
    given = {**from_file, **flags}
    problems += [] if problems else check_together(given, str(path), flags)
    return Collected(given, flags, tuple(warnings), tuple(problems))


def load_options(argv: Sequence[str]) -> Loaded:
    """Options from flags and the JSON file.

    Raises:
        ProblemsError: with every problem of the command line and the file.
        SystemExit: after `--help`.
    """
    return collect_options(argv).resolve()


def reload_options(loaded: Loaded) -> Loaded:
    """The options after reading the file again; the command line that was given still wins.

    Raises:
        ProblemsError: the file is broken; nothing has changed.
    """
    path = Path(loaded.options.run.config)
    from_file, problems, warnings = check_file(read_json_object(path), str(path))
    given = {**from_file, **loaded.flags}
    problems += [] if problems else check_together(given, str(path), loaded.flags)
    if problems:
        raise ProblemsError(problems)
    return Loaded(assemble(given), given, loaded.flags, tuple(warnings))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ProblemsError: the file is missing, is no JSON (with line and column), or holds something else.
    """

    def fail(remedy: str) -> ProblemsError:
        return ProblemsError([Problem(str(path), "", None, remedy)])

    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise fail("no such file; name one with --config") from None
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise fail(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise fail(f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise fail("is nested too deeply") from None
    except ValueError:
        raise fail("holds a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise fail("must hold a JSON object: { ... }")
    return value


def check_file(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """The right values of an options file, its problems, and a warning for each obsolete key."""
    owner = {name: section for section in SECTIONS.values() for name in option_fields(section)}
    known = {name: value for name, value in raw.items() if name in owner}
    good: dict[str, Any] = {}
    problems: list[Problem] = []
    for section in SECTIONS.values():
        values = {name: value for name, value in known.items() if owner[name] is section}
        section_good, section_problems = read_values(section, values, where)
        good |= section_good
        problems += section_problems
    warnings = [_obsolete(where, name) for name in OBSOLETE if name in raw]
    for name in raw:
        if name not in owner and name not in OBSOLETE:
            problems.append(Problem(where, name, raw[name], nearest(name, owner)))
    good.pop("config", None)  # a saved file names the file it came from; the one being read is the one that counts
    return good, problems, warnings


def _obsolete(where: str, name: str) -> str:
    return f"{where}: {name} is obsolete and changes nothing: {OBSOLETE[name]}"


def check_together(given: Mapping[str, Any], where: str, flags: Mapping[str, Any]) -> list[Problem]:
    """Problems that no option has by itself."""
    options = assemble(given)
    problems = []

    def add(name: str, remedy: str) -> None:
        problems.append(Problem("command line" if name in flags else where, name, given.get(name), remedy))

    model, data, noise = options.model, options.data, options.noise
    if model.disable_unet_training and model.disable_textenc_training:
        add("disable_textenc_training", "together with disable_unet_training nothing is left to train; drop one")
    if data.resolution % data.bucket_step:
        add("resolution", f"must be a multiple of bucket_step ({data.bucket_step})")
    if data.bucket_step % 8:
        add("bucket_step", "must be a multiple of 8, the size of a latent pixel")
    if noise.timestep_start >= noise.timestep_end:
        add("timestep_start", f"must be below timestep_end ({noise.timestep_end})")
    if -1 < noise.zero_frequency_noise_ratio < 0:
        add("zero_frequency_noise_ratio", "must be 0 or more, or -1 for zero terminal SNR")
    if options.ema.ema_decay_rate is not None and options.ema.ema_strength_target is not None:
        add("ema_strength_target", "and ema_decay_rate both set the rate of the EMA; drop one")
    name_problem = project_name_problem(options.run.project_name)
    if name_problem is not None:
        add("project_name", name_problem)
    return problems


def assemble(given: Mapping[str, Any]) -> Options:
    """The frozen options for checked values; what is not given has its default."""
    sections = {}
    for key, section in SECTIONS.items():
        sections[key] = section(**{name: given[name] for name in option_fields(section) if name in given})
    return Options(**sections)


def flat(options: Options) -> dict[str, Any]:
    """Every option by its flat name: the resolved `_main.json`, itself a valid options file."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for key in SECTIONS
        for name, value in _section_items(getattr(options, key))
    }


def _section_items(section: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(section, field.name)) for field in dataclasses.fields(section)]


def replace(options: Options, **changes: Any) -> Options:
    """The options with some values changed, by flat name.

    Raises:
        UserError: a name is unknown.
    """
    for name, value in changes.items():
        for key, section in SECTIONS.items():
            if name in option_fields(section):
                part = dataclasses.replace(getattr(options, key), **{name: value})
                options = dataclasses.replace(options, **{key: part})
                break
        else:
            raise UserError(f"{name} is not an option")
    return options
