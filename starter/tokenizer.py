"""The starter's own byte-pair tokenizer, in CLIP's file format (vocab.json, merges.txt)."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77

# Every word of the world's captions becomes one token. The ordinary words teach pieces of English, so that a word which
# the starter has never met falls into two or three of them instead of letters.
WORLD_WORDS = """a an the of on with in over picture drawing painting against background shape
    circle square triangle star ring cross small large
red orange yellow green blue purple grey pink cyan brown beige""".split()
ORDINARY_WORDS = """and for that this from have they one out what were there when your can said each which their will
other about many then them these some her would make like him into time has look two more write see number way could
people than first water been call who its now find long down day did get come made may part photo portrait style person
man woman cat dog house tree light dark black white old new good little round under between paper colour photograph
morning evening mountain river summer winter table window garden animal flower music stone silver golden zebra quick
jumping lazy fox vivid quartz pixel""".split()


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in CLIP's (GPT-2's) vocabulary files."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    spare = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(spare)}


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (arXiv 1508.07909) until every one of `words` is a single piece; ties go by the alphabet."""
    pieces = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their numbers, and the merges that make them; the last two numbers are start and end of text."""
    letters = sorted(byte_letters().values())
    merges = _learn_merges(sorted({*WORLD_WORDS, *ORDINARY_WORDS}))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer into `folder` and return the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    _write(folder / "vocab.json", json.dumps(tokens, ensure_ascii=False, separators=(",", ":")))
    _write(folder / "merges.txt", "\n".join(lines) + "\n")
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    return len(tokens)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
