"""Captions that are cut: found, measured and quoted, and counted only once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.captions import parse_caption
from data.item import Item
from data.lengths import cut_captions, load_lengths, save_lengths


class Words:
    """A tokenizer to which every word is a token; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        self.asked.extend(texts)
        return [[match.span() for match in re.finditer(r"[^\s,]+", text)] for text in texts]


def item(name: str, text: str) -> Item:
    return Item(name, name, 1, 1, parse_caption(text))


def numbered(count: int) -> str:
    return "a picture, " + " ".join(f"w{number}" for number in range(count - 2))


ITEMS = [item("fits", numbered(75)), item("cut", numbered(78)), item("short", "a cat"), item("longer", numbered(99))]


def test_longest_first_with_the_words_that_are_lost() -> None:
    longer, cut = cut_captions(ITEMS, Words())
    assert (cut.item.id, cut.tokens, cut.lost) == ("cut", 78, "w73 w74 w75")
    assert (longer.item.id, longer.tokens) == ("longer", 99)


def test_short_captions_are_not_even_asked_about() -> None:
    words = Words()
    cut_captions([item("a", "x" * 75), item("b", "")], words)
    assert words.asked == []


def test_known_lengths_are_not_counted_again() -> None:
    known: dict[str, int] = {}
    first = cut_captions(ITEMS, Words(), known)
    assert sorted(known.values()) == [75, 78, 99]
    words = Words()
    assert cut_captions(ITEMS, words, known) == first
    assert len(words.asked) == 2  # the two that are quoted


def test_tags_count_and_the_limit_is_the_callers() -> None:
    caption = ", ".join(["main", *(f"tag{number}" for number in range(9))])
    (cut,) = cut_captions([item("a", caption)], Words(), limit=8)
    assert cut.lost == "tag7, tag8"


def test_lengths_are_kept_by_tokenizer(tmp_path: Path) -> None:
    save_lengths(tmp_path, "one", {"abc": 80})
    assert load_lengths(tmp_path, "one") == {"abc": 80}
    assert load_lengths(tmp_path, "two") == {}
    for path in (tmp_path / "lengths").iterdir():
        path.write_text("[")
    assert load_lengths(tmp_path, "one") == {}
    save_lengths(path, "one", {})
