"""Captions that are longer than the text encoder reads, and the words that are lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data.captions import render
from data.item import Item
from utils.files import atomic_file

MAX_TOKENS = 75

# For each text the places (start, end) of its tokens, without those that mark start and end.
Tokenize = Callable[[Sequence[str]], Sequence[Sequence[tuple[int, int]]]]
_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class CutCaption:
    """A caption that the tokenizer cuts: how many tokens it has and the words that are lost."""

    item: Item
    tokens: int
    lost: str


def cut_captions(
    items: Sequence[Item], tokenize: Tokenize, known: dict[str, int] | None = None, *, limit: int = MAX_TOKENS
) -> tuple[CutCaption, ...]:
    """The captions of more than `limit` tokens, the longest first, as they read without shuffling.

    `known` holds the lengths that an earlier start counted (see `load_lengths`) and takes the new ones.
    """
    lengths = {} if known is None else known
    # A token is a byte at least: most captions are short enough to be left uncounted.
    texts = [(item, full_text(item)) for item in items]
    texts = [(item, text) for item, text in texts if len(text.encode("utf-8", "replace")) > limit]
    keys = {text: _key(text) for _, text in texts}
    new = sorted(text for text, key in keys.items() if key not in lengths)
    for start in range(0, len(new), _BATCH):
        batch = new[start : start + _BATCH]
        for text, spans in zip(batch, tokenize(batch), strict=True):
            lengths[keys[text]] = len(spans)
    long = [(item, text) for item, text in texts if lengths[keys[text]] > limit]
    spans_of = tokenize([text for _, text in long]) if long else []
    cut = [
        CutCaption(item, len(spans), text[spans[limit][0] :].strip())
        for (item, text), spans in zip(long, spans_of, strict=True)
    ]
    return tuple(sorted(cut, key=lambda caption: (-caption.tokens, caption.item.id)))


def load_lengths(folder: Path, tokenizer: str) -> dict[str, int]:
    """The lengths that `save_lengths` kept in `folder` for this tokenizer; none when there are none."""
    try:
        lengths = json.loads(_lengths_path(folder, tokenizer).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    if not isinstance(lengths, dict):
        return {}
    return {key: length for key, length in lengths.items() if isinstance(length, int)}


def save_lengths(folder: Path, tokenizer: str, lengths: Mapping[str, int]) -> None:
    """Keep the lengths in `folder` (see `data.index.cache_folder`), whole or not at all."""
    path = _lengths_path(folder, tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(lengths, separators=(",", ":")), encoding="ascii")
    except OSError:
        return


def _lengths_path(folder: Path, tokenizer: str) -> Path:
    return folder / "lengths" / f"{_key(tokenizer)}.json"


def full_text(item: Item) -> str:
    """The caption with all tags that may appear in it, in the order of the files."""
    return render(item.caption, Random(0), shuffle_tags=False, keep_tags=len(item.caption.tags))


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()
