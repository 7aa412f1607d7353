"""YAML and JSON as one plain tree: text as it was written, with line numbers, nothing executed or expanded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from data.text import BrokenFileError, without_surrogates

MAX_DEPTH = 12
_NULLS = {"", "~", "null", "Null", "NULL"}
_TAGS = {None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value as written. `null`: it says "nothing given"."""

    text: str
    line: int | None
    null: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """A sequence of values."""

    values: tuple[Node, ...]
    line: int | None


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys with values, in the order of the file."""

    pairs: tuple[tuple[Scalar, Node], ...]
    line: int | None


Node: TypeAlias = Scalar | Listing | Mapping


def parse_yaml(text: str, path: str) -> Node | None:
    """The tree of the one document in `text`; `None` when it is empty.

    Numbers and words stay as written (`on`, `1`, `1e-6`). Aliases are refused (a few lines of them stand for
    gigabytes), and so are tags of programs and nesting deeper than twelve.

    Raises:
        BrokenFileError: with file and line.
    """
    events = iter(yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)))
    try:
        tree = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if tree is not None:
                    raise BrokenFileError(path, None, "holds more than one YAML document")
                # One event after another: what is nested too deep is refused before the rest of it is looked at.
                tree = _from_events(next(events), events, path, 0)
    except yaml.MarkedYAMLError as error:
        # The end of the file is marked as one line below the last.
        line = min(error.problem_mark.line, text.rstrip().count("\n")) + 1 if error.problem_mark is not None else None
        raise BrokenFileError(path, line, f"is no valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise BrokenFileError(path, None, f"is no valid YAML: {' '.join(str(error).split())}") from error
    return None if isinstance(tree, Scalar) and tree.null and not tree.text else tree


def _from_events(event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> Node:
    assert event.start_mark is not None
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent):
        raise BrokenFileError(path, line, "uses a YAML alias (*name); write the value out")
    tag = getattr(event, "tag", None)
    if tag not in _TAGS:
        raise BrokenFileError(path, line, f"uses the YAML tag {tag}; only plain values are read")
    if depth > MAX_DEPTH:
        raise BrokenFileError(path, line, f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(event.value, line, event.style in (None, "") and tag is None and event.value in _NULLS)
    if isinstance(event, yaml.SequenceStartEvent):
        values = []
        while not isinstance(inner := next(events), yaml.SequenceEndEvent):
            values.append(_from_events(inner, events, path, depth + 1))
        return Listing(tuple(values), line)
    assert isinstance(event, yaml.MappingStartEvent)
    pairs = []
    while not isinstance(inner := next(events), yaml.MappingEndEvent):
        key = _from_events(inner, events, path, depth + 1)
        if not isinstance(key, Scalar):
            raise BrokenFileError(path, key.line, "has a key that is no plain word")
        pairs.append((key, _from_events(next(events), events, path, depth + 1)))
    return Mapping(tuple(pairs), line)


class _Number(str):
    """A JSON number as written."""

    __slots__ = ()


def parse_json(text: str, path: str, line: int | None = None) -> Node:
    """The tree of the JSON in `text`, numbers as written. `line`: where the text begins in its file.

    Raises:
        BrokenFileError: with file and line.
    """
    try:
        value = json.loads(
            text, parse_float=_Number, parse_int=_Number, parse_constant=_Number, object_pairs_hook=tuple
        )
    except json.JSONDecodeError as error:
        raise BrokenFileError(path, (line or 1) + error.lineno - 1, f"is no valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise BrokenFileError(path, line, f"is nested deeper than {MAX_DEPTH} levels") from error
    return _from_json(value, path, line, 0)


def _from_json(value: Any, path: str, line: int | None, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise BrokenFileError(path, line, f"is nested deeper than {MAX_DEPTH} levels")
    if value is None:
        return Scalar("", line, True)
    if isinstance(value, bool):
        return Scalar("true" if value else "false", line)
    if isinstance(value, str):
        return Scalar(without_surrogates(value), line)
    if isinstance(value, tuple):
        pairs = tuple(
            (Scalar(without_surrogates(key), line), _from_json(inner, path, line, depth + 1)) for key, inner in value
        )
        return Mapping(pairs, line)
    assert isinstance(value, list)
    return Listing(tuple(_from_json(inner, path, line, depth + 1) for inner in value), line)
