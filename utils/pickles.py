"""Old torch files (`.ckpt`, `.bin`, `.pt`): tensors are read from the pickle without running a line of it."""

from __future__ import annotations

import mmap
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, printable
from utils.pickle_machine import Machine
from utils.weights import MAX_TENSORS, require_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20  # a full SD 1.5 needs under 1 MiB; optimizer states and callbacks may add to it
# Whatever a damaged archive, or one made to damage, leads zipfile, pickletools, mmap and torch.frombuffer to.
_BROKEN = (
    *(zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError),
    *(ValueError, KeyError, IndexError, TypeError, OverflowError),
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of the torch file `path` by name: its own, or those under "state_dict".

    Files of torch 1.6 and later (zip archives) go through an interpreter of our own that can build tensors and
    containers and nothing else; older ones through torch's own restricted unpickler.
    Raises `UserError` when the file is damaged or holds no tensors.
    """
    require_file(path)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04":
            raise UserError(f"{printable(path)} is cut short; get the file again")
        if head[:1] != b"\x80":
            raise UserError(f"{printable(path)} is no model: neither a safetensors file nor one of torch's")
        return _named_tensors(_read_legacy(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _read_archive(path, archive)
    except _BROKEN as error:
        raise UserError(f"{printable(path)} is damaged ({printable(error)}); get the file again") from None
    return _named_tensors(content, path)


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    import torch

    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in named if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) > MAX_TENSORS:
        raise UserError(f"{printable(path)} holds no model: no dictionary of tensors was found in it")
    return tensors


def _read_legacy(path: Path) -> object:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # about protocols; what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever the bytes lead it to; the file is a stranger's.
    except Exception as error:  # noqa: BLE001
        # What torch says beyond the name is advice to run the code, which nobody should follow.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        asked = f"it asks for {named[1]}" if named is not None else "it is damaged, or holds more than tensors"
        raise UserError(
            f"{printable(path)} could not be read without running code from it ({asked}); get the model as .safetensors"
        ) from None


def _read_archive(path: Path, archive: zipfile.ZipFile) -> object:
    pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError(f"{printable(path)} is a zip archive, but not one of torch's")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(f"{printable(path)}: its pickle has {pickles[0].file_size} bytes, which is not sensible")
    records = _Records(path, archive, pickles[0].filename.removesuffix("data.pkl"))
    return Machine(records.numbers).run(archive.read(pickles[0]))


class _Records:
    """The raw numbers of an archive's storages, mapped, so that only what is used is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        self._infos = {info.filename: info for info in archive.infolist()}
        self._prefix = prefix
        order = self._infos.get(f"{prefix}byteorder")
        if order is not None and (order.file_size != len("little") or archive.read(order) != b"little"):
            raise ValueError("its numbers are big-endian")
        with path.open("rb") as file:
            # A private copy-on-write mapping: torch takes it for writable memory, the file stays as it is.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def numbers(self, key: str, dtype: torch.dtype) -> Tensor:
        """The storage `key` as a flat tensor, a view of the file."""
        import torch

        info = self._infos[f"{self._prefix}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("its tensors are compressed")
        # The local header repeats the name and may carry other extra bytes than the directory at the end.
        header = info.header_offset
        name_bytes = int.from_bytes(self._map[header + 26 : header + 28], "little")
        extra_bytes = int.from_bytes(self._map[header + 28 : header + 30], "little")
        start = header + 30 + name_bytes + extra_bytes
        if start + info.file_size > len(self._map):
            raise ValueError("a tensor lies beyond its end")
        count = info.file_size // dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
