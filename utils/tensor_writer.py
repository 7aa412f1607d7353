"""Tensors to a safetensors file, one at a time: cast, hashed and written without a second copy of the model."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HASH_KEY = "modelspec.hash_sha256"
_NO_HASH = "0x" + "0" * 64


class Piece(NamedTuple):
    """A tensor still to be made: its name and shape in the file, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(
    path: Path, pieces: Sequence[Piece], dtype: torch.dtype, metadata: Mapping[str, str], *, hashed: bool = False
) -> None:
    """Write `pieces` in `dtype` to `path`, mode 0644, not yet synced.

    With `hashed`, the SHA-256 of all tensor bytes goes into the metadata as `modelspec.hash_sha256`.
    Peak memory is a few of the tensors. Raises `OSError` when the disk is full.
    """
    ordered = sorted(pieces, key=lambda piece: piece.name)
    header = _header(ordered, dtype, dict(metadata) | ({HASH_KEY: _NO_HASH} if hashed else {}))
    with path.open("wb", buffering=0) as file:
        file.write(header)
        digest = hashlib.sha256() if hashed else None
        consumers = [_Consumer(lambda data: _write_all(file, data))]
        if digest is not None:
            consumers.append(_Consumer(digest.update))
        _pump(ordered, dtype, consumers)
        if digest is not None:
            file.seek(header.index(_NO_HASH.encode("ascii")))
            file.write(f"0x{digest.hexdigest()}".encode("ascii"))
    path.chmod(0o644)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _header(pieces: Sequence[Piece], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    import torch

    word = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for piece in pieces:
        end = start + dtype.itemsize * _product(piece.shape)
        table[piece.name] = {"dtype": word, "shape": list(piece.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _product(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _write_all(file: object, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # type: ignore[attr-defined]


def _pump(pieces: Sequence[Piece], dtype: torch.dtype, consumers: Sequence[_Consumer]) -> None:
    """Cast in this thread while others write and hash: each of the three releases the interpreter."""
    try:
        for piece in pieces:
            made = piece.make()
            assert tuple(made.shape) == piece.shape, piece.name
            data = tensor_bytes(made.detach().to(dtype).contiguous())
            for consumer in consumers:
                consumer.put(data)
    finally:
        for consumer in consumers:
            consumer.close()
    for consumer in consumers:
        if consumer.error is not None:
            raise consumer.error


class _Consumer:
    """A thread that eats bytes in order; after an error it goes on taking them, so that nobody waits for ever."""

    def __init__(self, eat: Callable[[memoryview], object]) -> None:
        self.error: BaseException | None = None
        self._eat = eat
        self._queue: Queue[memoryview | None] = Queue(maxsize=2)
        self._thread = Thread(target=self._run, name="tensor-writer", daemon=True)
        self._thread.start()

    def put(self, data: memoryview) -> None:
        self._queue.put(data)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self.error is None:
                try:
                    self._eat(data)
                except BaseException as error:  # noqa: BLE001 - handed to the caller by _pump
                    self.error = error
