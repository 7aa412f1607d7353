"""Captions: parsing, and the text of one visit."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data.captions import caption_from_name, collapse, is_empty, parse_caption, render
from data.item import Caption, Tag


@pytest.mark.parametrize(
    ("text", "main_prompt", "tags"),
    [
        ("a cat", "a cat", []),
        ("a cat, red ,  old", "a cat", ["red", "old"]),
        ("a cat,, red,red, \n", "a cat", ["red"]),
        (" a cat\nsitting, on a\r\nmat\n", "a cat sitting", ["on a mat"]),
        ("", "", []),
        (" \n", "", []),
        (", red", "", ["red"]),
        ("猫, 赤い", "猫", ["赤い"]),
    ],
)
def test_parse(text: str, main_prompt: str, tags: list[str]) -> None:
    assert parse_caption(text) == Caption(main_prompt, tuple(map(Tag, tags)))


def test_name_up_to_the_first_underscore() -> None:
    assert caption_from_name("a cat, red_01_2") == Caption("a cat", (Tag("red"),))
    assert caption_from_name("_01") == Caption("")


def test_empty_and_collapse() -> None:
    assert is_empty(parse_caption(" ,"))
    assert not is_empty(parse_caption(",x"))
    assert collapse([Tag("a", 2), Tag("b"), Tag("a", 3)]) == (Tag("a", 2), Tag("b"))


PLAIN = parse_caption("main, a, b, c, d, e")


def test_no_shuffle_is_as_written() -> None:
    assert render(PLAIN, random.Random(1), shuffle_tags=False, keep_tags=0) == "main, a, b, c, d, e"


def test_shuffle_moves_all_but_the_kept() -> None:
    texts = {render(PLAIN, random.Random(seed), shuffle_tags=True, keep_tags=2) for seed in range(200)}
    assert len(texts) == 6
    assert all(text.startswith("main, a, b, ") and len(text) == len("main, a, b, c, d, e") for text in texts)
    firsts = Counter(render(PLAIN, random.Random(s), shuffle_tags=True, keep_tags=0)[6] for s in range(2000))
    assert all(abs(firsts[tag] - 400) < 3 * (2000 * 0.2 * 0.8) ** 0.5 for tag in "abcde")


def test_same_stream_same_text() -> None:
    assert render(PLAIN, random.Random(7), shuffle_tags=True, keep_tags=1) == render(
        PLAIN, random.Random(7), shuffle_tags=True, keep_tags=1
    )


WEIGHTED = Caption("m", (Tag("aa", 1.0), Tag("bb", 2.0), Tag("cc", 5.0), Tag("dd", 0.0)), max_length=5)


def test_weights_set_the_odds_and_length_the_number() -> None:
    draws = Counter(render(WEIGHTED, random.Random(seed), shuffle_tags=True, keep_tags=0) for seed in range(4000))
    assert set(draws) == {"m, aa", "m, bb", "m, cc"}
    for tag, odds in (("aa", 1 / 8), ("bb", 2 / 8), ("cc", 5 / 8)):
        assert abs(draws[f"m, {tag}"] / 4000 - odds) < 3 * (odds * (1 - odds) / 4000) ** 0.5


def test_weighted_without_shuffle_is_sorted_by_weight() -> None:
    caption = Caption("m", WEIGHTED.tags)
    assert render(caption, random.Random(3), shuffle_tags=False, keep_tags=0) == "m, cc, bb, aa"
    assert render(caption, random.Random(3), shuffle_tags=False, keep_tags=1) == "m, aa, cc, bb"


def test_equal_weights_are_no_weights() -> None:
    caption = Caption("m", (Tag("a", 2.0), Tag("b", 2.0)))
    assert render(caption, random.Random(1), shuffle_tags=False, keep_tags=0) == "m, a, b"


def test_length_counts_main_prompt_and_kept_tags() -> None:
    caption = Caption("main", (Tag("a"), Tag("bbbb"), Tag("c")), max_length=12)
    assert render(caption, random.Random(1), shuffle_tags=False, keep_tags=3) == "main, a"
    assert render(Caption("main", (), 2), random.Random(1), shuffle_tags=False, keep_tags=0) == "main"


def test_no_main_prompt_leaves_no_comma() -> None:
    assert render(Caption("", (Tag("a"), Tag("b"))), random.Random(1), shuffle_tags=False, keep_tags=0) == "a, b"
