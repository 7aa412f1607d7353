"""Captions that are longer than the text encoder reads, and the words that are lost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from data.captions import render
from data.item import Item

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

    `known` holds the lengths that an earlier start counted (see `data.index.Index.tokens`) and takes the new ones.
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


def full_text(item: Item) -> str:
    """The caption with all tags that may appear in it, in the order of the files."""
    return render(item.caption, Random(0), shuffle_tags=False, keep_tags=len(item.caption.tags))


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()
