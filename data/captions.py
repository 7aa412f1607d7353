"""Captions: from text to main prompt and tags, and to the text of one visit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

from data.item import Caption, Tag
from data.text import without_surrogates

EMPTY = Caption("")


def parse_caption(text: str, max_length: int | None = None) -> Caption:
    """The caption in `text`: the part before the first comma is the main prompt, the others are tags.

    Line ends and repeated spaces count as one space, empty parts are dropped, equal tags collapse.
    """
    main_prompt, *tags = [part.strip() for part in " ".join(text.split()).split(",")]
    return Caption(main_prompt, tuple(map(Tag, filter(None, dict.fromkeys(tags)))), max_length)


def caption_from_name(stem: str) -> Caption:
    """The caption in a file name without its extension: what stands before the first underscore."""
    return parse_caption(without_surrogates(stem.split("_", 1)[0]))


def collapse(tags: Iterable[Tag]) -> tuple[Tag, ...]:
    """The tags without repetitions of a text; the first one stays, with its place and weight."""
    first: dict[str, Tag] = {}
    for tag in tags:
        first.setdefault(tag.text, tag)
    return tuple(first.values())


def is_empty(caption: Caption) -> bool:
    """Whether the caption says nothing."""
    return not caption.main_prompt and not caption.tags


def render(caption: Caption, chance: Random, *, shuffle_tags: bool, keep_tags: int) -> str:
    """The caption of one visit: `main, tag1, tag2`.

    The first `keep_tags` tags stay in front. The others are put in random order with `shuffle_tags`. Tags of at least
    two different weights are drawn one by one without replacement, in proportion to their weights, until the next one
    would make the text longer than `caption.max_length`; without `shuffle_tags` those drawn are then sorted by weight.
    One number is taken from `chance` for each tag that is not kept when tags are drawn or shuffled, else none.
    """
    kept, loose = list(caption.tags[:keep_tags]), list(caption.tags[keep_tags:])
    weighted = len({tag.weight for tag in caption.tags}) > 1
    if weighted:
        loose = _drawn(loose, chance)
    elif shuffle_tags:
        loose = _drawn([Tag(tag.text) for tag in loose], chance)
    fitting = _fitting(caption, kept + loose)
    if weighted and not shuffle_tags:
        fitting[len(kept) :] = sorted(fitting[len(kept) :], key=lambda tag: -tag.weight)
    return ", ".join(part for part in (caption.main_prompt, *(tag.text for tag in fitting)) if part)


def _drawn(tags: list[Tag], chance: Random) -> list[Tag]:
    """The tags in the order of a weighted draw without replacement; tags of weight 0 are never drawn.

    The first of several exponential clocks rings with odds in proportion to its rate, and the others do not remember:
    sorting by the time of ringing is the whole draw. With equal weights every order is equally likely.
    """
    clocks = [-math.log(1.0 - chance.random()) for _ in tags]
    rings = [
        (clock / tag.weight, place)
        for place, (clock, tag) in enumerate(zip(clocks, tags, strict=True))
        if tag.weight > 0
    ]
    return [tags[place] for _, place in sorted(rings)]


def _fitting(caption: Caption, tags: list[Tag]) -> list[Tag]:
    """The leading tags with which the rendered text stays within the caption's length."""
    if caption.max_length is None:
        return tags
    length = len(caption.main_prompt)
    for place, tag in enumerate(tags):
        length += len(tag.text) + (2 if length else 0)
        if length > caption.max_length:
            return tags[:place]
    return tags
