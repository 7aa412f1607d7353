"""From frozen dataclasses to flags, JSON checks and help: an option is one line, the rest follows from it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import Problem

_NO_VALUE = object()
# Of a whole number that a float can hold.
MOST_BITS = 1023
PAGE = "docs/configuration.md"


@dataclass(frozen=True, slots=True)
class Spec:
    """What an option line says beyond its type and default."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OptionField:
    """An option as read from its dataclass.

    Args:
        kind: the type without `None`: bool, int, float, str, tuple (a list of texts) or object (any JSON).
        optional: whether `None` (not given) is a value.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    spec: Spec


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that is an option: `low` and `high` are inclusive bounds."""
    return dataclasses.field(default=default, metadata={"spec": Spec(help, low, high, tuple(choices))})


def option_fields(section: type) -> dict[str, OptionField]:
    """The options of a section, by name, in the order of their lines."""
    hints = typing.get_type_hints(section)
    found = {}
    for field in dataclasses.fields(section):
        hint, optional = hints[field.name], False
        if isinstance(hint, types.UnionType):
            optional = types.NoneType in typing.get_args(hint)
            (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        kind = typing.get_origin(hint) or hint
        kind = object if kind is Any else kind
        found[field.name] = OptionField(field.name, kind, optional, field.default, field.metadata["spec"])
    return found


def nearest(name: str, known: Iterable[str], page: str = PAGE) -> str:
    """The remedy for an unknown name: the nearest known one, or the page to look at."""
    candidates = list(known)
    match = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), candidates, n=1, cutoff=0.6)
    return f"unknown; did you mean {match[0]}?" if match else f"unknown; see {page} for the names"


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
}


def check_value(field: OptionField, value: Any, where: str) -> tuple[Any, Problem | None]:
    """`value` from JSON as the option's type, or the problem with it."""

    def wrong(remedy: str) -> tuple[None, Problem]:
        return None, Problem(where, field.name, value, remedy)

    kind = field.kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > MOST_BITS:
            return wrong("must be a finite number")
        value = float(value)
    if kind is tuple and isinstance(value, str):
        value = [value]
    if kind is tuple and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value), None
    if kind is object:
        return value, None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return wrong(f"must be {_KINDS[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        return wrong("must be a finite number")
    return _check_range(field.spec, value, wrong)


def _check_range(spec: Spec, value: Any, wrong: Callable[[str], tuple[None, Problem]]) -> tuple[Any, Problem | None]:
    if spec.choices and value not in spec.choices:
        return wrong(f"must be one of {', '.join(spec.choices)}")
    if (spec.low is not None and value < spec.low) or (spec.high is not None and value > spec.high):
        return wrong(f"must be {_bounds(spec)}")
    return value, None


def read_values(
    section: type, values: Mapping[str, Any], where: str, page: str = PAGE
) -> tuple[dict[str, Any], list[Problem]]:
    """The values of a JSON object that are given (not null) and right, and every problem with the others.

    `page`: where the names are explained.
    """
    fields = option_fields(section)
    good, problems = {}, []
    for name, value in values.items():
        if name not in fields:
            problems.append(Problem(where, name, value, nearest(name, fields, page)))
        elif value is not None:
            checked, problem = check_value(fields[name], value, where)
            if problem is None:
                good[name] = checked
            else:
                problems.append(problem)
    return good, problems


def parse_text(field: OptionField, text: Any, where: str) -> tuple[Any, Problem | None]:
    """The value of a flag, from the command line's text."""
    if text is _NO_VALUE:
        if field.kind is bool:
            return True, None
        return None, Problem(where, f"--{field.name}", None, f"needs a value: {_KINDS.get(field.kind, 'text')}")
    value: Any = text
    lowered = text.strip().lower()
    if field.kind is bool and lowered in ("true", "false"):
        value = lowered == "true"
    elif field.kind in (int, float):
        try:
            value = field.kind(text)
        except ValueError:
            pass  # check_value words the problem, with the text as it was given
    elif field.kind is tuple:
        value = [part for part in (part.strip() for part in text.split(",")) if part]
    return check_value(field, value, where)


def build_parser(sections: Sequence[type], prog: str, description: str) -> argparse.ArgumentParser:
    """Flags for the options of all sections, a help group for each; values are checked later, all at once."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    for section in sections:
        group = parser.add_argument_group((section.__doc__ or section.__name__).strip().split("\n")[0].rstrip("."))
        for field in option_fields(section).values():
            group.add_argument(
                f"--{field.name}",
                nargs="?",
                const=_NO_VALUE,
                default=argparse.SUPPRESS,
                metavar=metavar(field),
                help=help_text(field).replace("%", "%%"),
            )
    return parser


def metavar(field: OptionField) -> str:
    """What stands for the value in the help."""
    if field.spec.choices:
        return "{" + ",".join(field.spec.choices) + "}"
    return {bool: "true|false", int: "N", float: "X", str: "TEXT", tuple: "A,B"}.get(field.kind, "TEXT")


def help_text(field: OptionField) -> str:
    """The sentence of the option with its default and bounds."""
    notes = [f"default: {show(field.default)}"]
    if field.spec.low is not None or field.spec.high is not None:
        notes.append(_bounds(field.spec))
    return f"{field.spec.help} ({'; '.join(notes)})"


def show(value: Any) -> str:
    """A value as it is written in JSON files, `none` when it is not given."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _bounds(spec: Spec) -> str:
    if spec.low is None:
        return f"at most {spec.high:g}"
    if spec.high is None:
        return f"at least {spec.low:g}"
    return f"between {spec.low:g} and {spec.high:g}"


def parse_command_line(
    parser: argparse.ArgumentParser, sections: Sequence[type], argv: Sequence[str], obsolete: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Problem]]:
    """The flags that are given, checked, and every problem with them; `obsolete` ones are passed over."""
    where = "command line"
    known, unknown = parser.parse_known_args(list(argv))
    fields = {name: field for section in sections for name, field in option_fields(section).items()}
    good, problems = {}, []
    for name, text in vars(known).items():
        value, problem = parse_text(fields[name], text, where)
        if problem is None:
            good[name] = value
        else:
            problems.append(problem)
    passed_over = False
    for word in unknown:
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            passed_over = flag[2:] in set(obsolete)
        if passed_over:
            continue
        if flag.startswith("--"):
            problems.append(Problem(where, flag, value or None, nearest(flag, fields)))
        elif not (flag and problems and problems[-1].key.startswith("--") and problems[-1].value is None):
            problems.append(Problem(where, "", word, "is not a flag; flags begin with --"))
    return good, problems
