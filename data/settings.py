"""What captions and settings files say about a picture, and how what they say is merged."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from data.captions import collapse, parse_caption
from data.item import Caption, Item, Tag
from data.nodes import Listing, Mapping, Node, Scalar
from data.text import BrokenFileError
from utils.errors import Problem, printable

MAX_MULTIPLY = 10_000.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What one file, or several merged, say; `None` is "nothing said"."""

    main_prompt: str | None = None
    tags: tuple[Tag, ...] = ()
    max_caption_length: int | None = None
    rating: float | None = None
    multiply: float | None = None
    cond_dropout: float | None = None
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    batch_id: str | None = None
    loss_scale: float | None = None


NOTHING = Settings()
_SCALARS = tuple(name for name in Settings.__dataclass_fields__ if name != "tags")


def merge(outer: Settings, inner: Settings) -> Settings:
    """Both, where `inner` is the more specific one: its scalars win, its tags come first."""
    if outer is NOTHING:
        return inner
    if inner is NOTHING:
        return outer
    given = {name: value for name in _SCALARS if (value := getattr(inner, name)) is not None}
    tags = collapse(inner.tags + outer.tags) if inner.tags and outer.tags else inner.tags or outer.tags
    return replace(outer, tags=tags, **given)


def make_item(id: str, path: str, width: int, height: int, settings: Settings, fallback: Caption) -> Item:
    """The item of a picture; its main prompt comes from `fallback` when no file gave one."""
    main_prompt, tags = settings.main_prompt, settings.tags
    if main_prompt is None:
        main_prompt, tags = fallback.main_prompt, collapse(fallback.tags + tags)
    return Item(
        id,
        path,
        width,
        height,
        Caption(main_prompt, tags, settings.max_caption_length),
        multiply=1.0 if settings.multiply is None else settings.multiply,
        rating=1.0 if settings.rating is None else settings.rating,
        batch_id="" if settings.batch_id is None else settings.batch_id,
        loss_scale=1.0 if settings.loss_scale is None else settings.loss_scale,
        cond_dropout=settings.cond_dropout,
        flip_p=settings.flip_p,
        shuffle_tags=settings.shuffle_tags,
    )


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a file that the user should know and that stops nothing."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{printable(self.where)}: {self.text}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A picture that is left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


@dataclass(slots=True)
class Notes:
    """What is found on the way: problems that must be mended before training, and warnings."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Note] = field(default_factory=list)

    def warn(self, where: str, text: str) -> None:
        """Add a warning."""
        self.warnings.append(Note(where, text))

    def broken(self, error: BrokenFileError) -> None:
        """Add the problem of a file that cannot be understood."""
        place = error.path if error.line is None else f"{error.path}, line {error.line}"
        self.problems.append(Problem(place, "", None, error.reason))


def caption_settings(text: str) -> Settings:
    """What a caption text says. An empty one says "nothing", which is not the same as saying nothing."""
    caption = parse_caption(text)
    return Settings(main_prompt=caption.main_prompt, tags=caption.tags)


def read_settings(tree: Node, where: str, notes: Notes, *, ignore: tuple[str, ...] = ()) -> Settings:
    """What the mapping `tree` of the file `where` says; mistakes go to `notes`, keys in `ignore` are left alone."""
    if not isinstance(tree, Mapping):
        notes.problems.append(_problem(where, tree, "", "must be keys with values, such as `main_prompt: a cat`"))
        return NOTHING
    values: dict[str, Any] = {}
    caption = NOTHING
    seen: set[str] = set()
    for key, value in tree.pairs:
        if key.text in seen:
            notes.warn(where, f"`{printable(key.text)}` is given twice; the last one counts")
        seen.add(key.text)
        if key.text in ignore or (isinstance(value, Scalar) and value.null):
            continue
        if key.text == "caption":
            caption = _caption(value, where, notes)
        elif (reader := _READERS.get(key.text)) is None:
            notes.warn(where, f"unknown key `{printable(key.text)}`{_nearest(key.text)}; it changes nothing")
        else:
            try:
                values[key.text] = reader(value)
            except ValueError as error:
                notes.problems.append(_problem(where, value, key.text, str(error)))
    return merge(caption, Settings(**values)) if values else caption


def read_number(name: str, text: str, where: str, notes: Notes) -> Settings:
    """What the folder file `name`.txt with this text says."""
    value = Scalar(text.strip(), None)
    try:
        return Settings(**{name: _READERS[name](value)})
    except ValueError as error:
        notes.problems.append(Problem(where, "", value.text, str(error)))
        return NOTHING


def _caption(value: Node, where: str, notes: Notes) -> Settings:
    if isinstance(value, Scalar):
        return caption_settings(value.text)
    if isinstance(value, Mapping):
        if any(key.text == "caption" for key, _ in value.pairs):
            notes.problems.append(_problem(where, value, "caption", "holds another caption"))
            return NOTHING
        return read_settings(value, where, notes)
    notes.problems.append(_problem(where, value, "caption", "must be a text, or keys such as main_prompt and tags"))
    return NOTHING


def _problem(where: str, node: Node, key: str, remedy: str) -> Problem:
    place = where if node.line is None else f"{where}, line {node.line}"
    return Problem(place, key, node.text if isinstance(node, Scalar) else None, remedy)


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, [*_READERS, "caption"], n=1)
    return f", perhaps `{close[0]}` is meant" if close else ""


def _text(node: Node) -> str:
    if not isinstance(node, Scalar):
        raise ValueError("must be a text")
    return " ".join(node.text.splitlines()).strip()


def _tags(node: Node) -> tuple[Tag, ...]:
    """Tags from a list of texts or `{tag, weight}`, each as written; one text is split at commas, as a caption is."""
    if isinstance(node, Scalar):
        return collapse(Tag(text) for part in node.text.split(",") if (text := _text(Scalar(part, None))))
    if not isinstance(node, Listing):
        raise ValueError("must be a list of tags")
    return collapse(tag for value in node.values for tag in _tag(value))


def _tag(node: Node) -> tuple[Tag, ...]:
    if isinstance(node, Scalar):
        return (Tag(text),) if (text := _text(node)) else ()
    if isinstance(node, Listing):
        raise ValueError("must be a list of tags, not of lists")
    values = {key.text: value for key, value in node.pairs}
    if not values.keys() <= {"tag", "weight"} or "tag" not in values:
        raise ValueError("a tag with a weight is written as {tag: red, weight: 0.5}")
    weight = values.get("weight")
    number = 1.0 if weight is None or (isinstance(weight, Scalar) and weight.null) else _number(0.0, math.inf)(weight)
    text = _text(values["tag"])
    return (Tag(text, number),) if text else ()


def _number(low: float, high: float) -> Callable[[Node], float]:
    bounds = "any number" if low == -math.inf else f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"

    def read(node: Node) -> float:
        try:
            value = float(node.text) if isinstance(node, Scalar) else math.nan
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"must be a number: {bounds}")
        return value

    return read


def _length(node: Node) -> int:
    value = _number(0.0, 1e9)(node)
    if value != int(value):
        raise ValueError("must be a whole number of characters")
    return int(value)


def _switch(node: Node) -> bool:
    word = node.text.strip().lower() if isinstance(node, Scalar) else ""
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("must be true or false")


_READERS: dict[str, Callable[[Node], Any]] = {
    "main_prompt": _text,
    "tags": _tags,
    "rating": _number(0.0, math.inf),
    "max_caption_length": _length,
    "multiply": _number(0.0, MAX_MULTIPLY),
    "cond_dropout": _number(0.0, 1.0),
    "flip_p": _number(0.0, 1.0),
    "shuffle_tags": _switch,
    "batch_id": _text,
    "loss_scale": _number(-math.inf, math.inf),
}
