"""Named streams: every random choice is a function of the seed and of what it is for, never of history."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Key = str | int


def stream_seed(seed: int, name: str, *key: Key) -> int:
    """The 63-bit seed of the stream `name` for `key`.

    It depends on the arguments alone: not on the platform, on PYTHONHASHSEED or on what was drawn before.
    JSON (ASCII, escaped) keeps ("a", 1) apart from ("a1",) and takes file names that are no valid UTF-8.
    """
    text = json.dumps([seed, name, *key], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, name: str, *key: Key) -> random.Random:
    """A generator of plain numbers and orders for the stream `name`."""
    return random.Random(stream_seed(seed, name, *key))


def tensor_stream(seed: int, name: str, *key: Key) -> torch.Generator:
    """A CPU generator of tensors for the stream `name`: the CPU's, so that the draws are the same on every device."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, name, *key))


def random_seed() -> int:
    """A seed from the operating system, for `seed = -1`; the caller logs and saves it."""
    return random.SystemRandom().randrange(2**31)
