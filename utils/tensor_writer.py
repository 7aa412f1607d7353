"""Tensors to a safetensors file, cast and written in small pieces, without a second copy of the model."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import UserError, printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of one length, so that the hash of a file read back and found good can take its place in the header.
HASH_KEY, UNSEALED_KEY = "modelspec.hash_sha256", "emulsion.not_verified"
NO_HASH = "0x" + "0" * 64
# Small enough to stay in the processor's cache between casting and writing.
CHUNK_NUMBERS = 1 << 21


class Piece(NamedTuple):
    """A tensor still to be made: its name and shape in the file, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(path: Path, pieces: Sequence[Piece], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write `pieces` in `dtype` to `path`, mode 0644, not yet synced.

    Peak memory is the largest tensor that `make` creates, and a few MiB. Raises `OSError` when the disk is full.
    """
    import torch

    ordered = sorted(pieces, key=lambda piece: piece.name)
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(_header(ordered, dtype, metadata)))
        buffer = torch.empty(CHUNK_NUMBERS, dtype=dtype)
        for piece in ordered:
            made = piece.make()
            assert tuple(made.shape) == piece.shape, piece.name
            for chunk in flat_chunks(made, buffer):
                _write_all(file, _bytes_of(chunk))
    path.chmod(0o644)


def flat_chunks(tensor: Tensor, buffer: Tensor) -> Iterator[Tensor]:
    """The numbers of `tensor` in the precision of `buffer`, flat and piece by piece.

    What needs casting is cast into `buffer`, so a piece is good until the next one is asked for.
    """
    for piece in _split(tensor.detach()):
        yield piece if piece.dtype == buffer.dtype else buffer[: piece.numel()].copy_(piece)


def same_tensor(found: Tensor, expected: Tensor, buffer: Tensor) -> bool:
    """Whether `found` is `expected`, cast to its precision, bit for bit; `buffer` is of that precision."""
    import torch

    if found.shape != expected.shape or found.dtype != buffer.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32}[found.element_size()]
    pairs = zip(_split(found), flat_chunks(expected, buffer), strict=True)
    return all(torch.equal(theirs.view(integers), ours.view(integers)) for theirs, ours in pairs)


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    import torch

    return torch.split(tensor.reshape(-1), CHUNK_NUMBERS)


def hash_tensors(path: Path) -> str:
    """The SHA-256 of all tensor bytes of the safetensors file `path`, as the metadata standard spells it."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while count := file.readinto(block):
            digest.update(block[:count])
    return f"0x{digest.hexdigest()}"


def seal(path: Path, found: str) -> None:
    """Put the hash `found` into the metadata of a file that was read back and found good.

    Raises `UserError` when the file carries a hash already and it is another one.
    """
    unsealed = f'"{UNSEALED_KEY}":"{NO_HASH}"'.encode("ascii")
    with path.open("r+b", buffering=0) as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        if unsealed in header:
            file.seek(8 + header.index(unsealed))
            file.write(f'"{HASH_KEY}":"{found}"'.encode("ascii"))
        elif found.encode("ascii") not in header:
            raise UserError(f"{printable(path)}: the tensors are not those that its hash was made of")


def _header(pieces: Sequence[Piece], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    import torch

    word = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for piece in pieces:
        end = start + dtype.itemsize * prod(piece.shape)
        table[piece.name] = {"dtype": word, "shape": list(piece.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(chunk: Tensor) -> memoryview:
    import torch

    array: Any = chunk.view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
