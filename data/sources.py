"""From the option data_root, in any of its forms, to all items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.folder import Found, read_folder, unique_ids
from data.item import Item
from data.manifest import MANIFEST_SUFFIXES, read_manifest
from data.settings import Notes, Unreadable
from utils.errors import Problem, ProblemsError, UserError, printable

_FORMS = 'a folder, a .json or .jsonl manifest, a list of those, or {"resolver": "directory", "path": ...}'
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or a manifest."""

    path: str
    is_manifest: bool


def find_data(data_root: Any, *, index_kind: str = "off", progress: Callable[[int], object] | None = None) -> Found:
    """The pictures of all folders and manifests that `data_root` names, one after another.

    Args:
        data_root: a path, a list of forms, or {"resolver": "directory" | "json" | "multi", "path" / "resolvers": ...}.
        index_kind: where to keep what was learned for the next start (see `data.index.index_path`).
        progress: hears the number of files of each lot that has been read.

    Raises:
        UserError: a folder is not there, or there is no picture in any.
        ProblemsError: settings that cannot be meant, all at once, each with its file.
    """
    notes = Notes()
    items: list[Item] = []
    unreadable: list[Unreadable] = []
    sizes: dict[str, int] = {}
    for source in sources(data_root):
        if source.is_manifest:
            some, left_out = read_manifest(source.path, notes)
        else:
            found = read_folder(source.path, notes, index_kind=index_kind, progress=progress)
            some, left_out = list(found.items), list(found.unreadable)
            sizes |= found.sizes
        items.extend(some)
        unreadable.extend(left_out)
    _nested_roots([source.path for source in sources(data_root) if not source.is_manifest], notes)
    if notes.problems:
        raise ProblemsError(notes.problems)
    if not items:
        raise UserError(_nothing_found(data_root, unreadable))
    return Found(unique_ids(items), tuple(unreadable), tuple(notes.warnings), sizes)


def sources(data_root: Any) -> tuple[Source, ...]:
    """The folders and manifests of `data_root`, in order.

    Raises:
        ProblemsError: parts that have none of the known forms, all at once.
    """
    problems: list[Problem] = []
    found = tuple(_sources(data_root, problems, 0))
    if not found and not problems:
        problems.append(Problem("data_root", "", data_root, f"names nothing; give {_FORMS}"))
    if problems:
        raise ProblemsError(problems)
    return found


def _nested_roots(roots: list[str], notes: Notes) -> None:
    """Warn about roots whose pictures another root holds as well: they are trained as often as they are named."""
    whole = [Path(root).resolve() for root in roots]
    for place, inner in enumerate(whole):
        for other, outer in enumerate(whole):
            if other != place and inner.is_relative_to(outer) and (inner != outer or other < place):
                notes.warn(
                    roots[place], f"lies in the data root {printable(roots[other])}, too; its pictures count twice"
                )


def _sources(form: Any, problems: list[Problem], depth: int) -> list[Source]:
    if depth > _MAX_DEPTH:
        problems.append(Problem("data_root", "", None, f"is nested deeper than {_MAX_DEPTH} levels"))
        return []
    if isinstance(form, str | Path) and str(form):
        return [Source(str(form), str(form).lower().endswith(MANIFEST_SUFFIXES) and not Path(form).is_dir())]
    if isinstance(form, list | tuple):
        return [source for part in form for source in _sources(part, problems, depth + 1)]
    if isinstance(form, Mapping):
        return _resolver(form, problems, depth)
    problems.append(Problem("data_root", "", form, f"must be {_FORMS}"))
    return []


def _resolver(form: Mapping[Any, Any], problems: list[Problem], depth: int) -> list[Source]:
    kind = form.get("resolver")
    for key in form:
        if key not in ("resolver", "path", "resolvers"):
            problems.append(Problem("data_root", str(key), None, "unknown key; there are resolver, path and resolvers"))
    if kind == "multi":
        parts = form.get("resolvers")
        if isinstance(parts, list):
            return _sources(parts, problems, depth + 1)
        problems.append(Problem("data_root", "resolvers", parts, "must be a list of resolvers"))
    elif kind in ("directory", "json"):
        path = form.get("path")
        if isinstance(path, str) and path:
            return [Source(path, kind == "json")]
        problems.append(Problem("data_root", "path", path, f"must be the path of a {kind}"))
    else:
        problems.append(Problem("data_root", "resolver", kind, "must be directory, json or multi"))
    return []


def _nothing_found(data_root: Any, unreadable: list[Unreadable]) -> str:
    text = f"data_root: there is no picture to train on in {printable(data_root)}"
    if unreadable:
        shown = "".join(f"\n  {picture}" for picture in unreadable[:5])
        text += f"; {len(unreadable):,} cannot be read:{shown}"
    return text
