"""The usual grammar of prompts that weigh their words: (more), (much more:1.4), [less], with \\( for a real bracket."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from utils.models import Models

STEP = 1.1
_PIECES = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """`prompt` in pieces of one weight each, without its brackets.

    Round brackets weigh 1.1, or what stands behind a colon; square ones 1 / 1.1. They nest. A bracket that is never
    closed weighs to the end, one that was never opened is text.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def weigh(factor: float, bracket: str) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        _, start = opened.pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]
        return True

    for match in _PIECES.finditer(prompt):
        piece = match.group()
        if piece in ("(", "["):
            opened.append((piece, len(pieces)))
            continue
        closing = {")": (STEP, "("), "]": (1 / STEP, "[")}.get(piece)
        if piece[0] == ":" and len(piece) > 1:
            closing = float(piece[1:-1]), "("
        if closing is None or not weigh(*closing):
            pieces.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    while opened:
        weigh(STEP if opened[-1][0] == "(" else 1 / STEP, opened[-1][0])
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def weighted_tokens(models: Models, prompt: str) -> tuple[Tensor, Tensor]:
    """Token numbers and their weights, (1, 77) each; start, end and padding weigh 1."""
    import torch

    tokenizer, most = models.tokenizer, models.max_tokens - 2
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_weights(prompt):
        found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += found
        weights += [weight] * len(found)
    whole = [tokenizer.bos_token_id, *ids[:most], tokenizer.eos_token_id]
    padding = models.max_tokens - len(whole)
    whole += [tokenizer.pad_token_id] * padding
    return torch.tensor([whole]), torch.tensor([[1.0, *weights[:most], 1.0, *[1.0] * padding]])


def weigh(embedding: Tensor, weights: Tensor) -> Tensor:
    """`embedding` (B, 77, W) with each token times its weight (B, 77), brought back to the mean that it had."""
    weighted = embedding * weights[..., None].to(embedding)
    before, after = embedding.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
    return weighted * (before / after)
