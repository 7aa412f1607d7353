"""What has changed between a saved run and the present one, and whether an exact resume still means the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from utils.errors import printable

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs; `saved` and `now` are JSON text, or "(absent)"."""

    key: str
    saved: str
    now: str

    def __str__(self) -> str:
        return f"{printable(self.key)}: {printable(self.saved)} -> {printable(self.now)}"


def compare_resume(
    saved: Mapping[str, Any], now: Mapping[str, Any], harmless: Sequence[str]
) -> tuple[list[Change], list[Change]]:
    """The harmless and the breaking changes from `saved` to `now`, sorted by key.

    Args:
        saved, now: nested mappings of plain JSON; keys are joined by dots ("options.lr", "versions.torch").
        harmless: patterns of such keys, with `*` and `?`, whose change leaves the meaning of an exact resume alone.
            Everything else breaks it: a rule that was forgotten must not change a run in silence.
    """
    before, after = _flat(saved), _flat(now)
    changes = [
        Change(key, _text(before.get(key, _ABSENT)), _text(after.get(key, _ABSENT)))
        for key in sorted(before.keys() | after.keys())
    ]
    changes = [change for change in changes if change.saved != change.now]
    passed = [any(fnmatchcase(change.key, pattern) for pattern in harmless) for change in changes]
    return (
        [change for change, good in zip(changes, passed, strict=True) if good],
        [change for change, good in zip(changes, passed, strict=True) if not good],
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    """`value` as it stands in a manifest, so that a tuple equals the list it has become there."""
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)
