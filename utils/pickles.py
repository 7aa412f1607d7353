"""Old torch files (`.ckpt`, `.bin`, `.pt`): tensors are read from the pickle without running a line of it."""

from __future__ import annotations

import mmap
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable
from utils.weights import MAX_TENSORS, require_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20  # a full SD 1.5 needs under 1 MiB; optimizer states and callbacks may add to it
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_REBUILDERS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"}
# Whatever a damaged archive, or one made to damage, leads zipfile, pickletools, mmap and torch.frombuffer to.
_BROKEN = (
    *(zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError),
    *(ValueError, KeyError, IndexError, TypeError, OverflowError),
)
_CONTAINERS = {"collections OrderedDict", "builtins dict", "__builtin__ dict"}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of the torch file `path` by name: its own, or those under "state_dict".

    Files of torch 1.6 and later (zip archives) go through an interpreter of our own that can build tensors and
    containers and nothing else; older ones through torch's own restricted unpickler.
    Raises `UserError` when the file is damaged or holds no tensors.
    """
    require_file(path)
    if not zipfile.is_zipfile(path):
        return _named_tensors(_read_legacy(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _read_archive(path, archive)
    except _BROKEN as error:
        raise UserError(f"{printable(path)} is damaged ({printable(error)}); get the file again") from None
    return _named_tensors(content, path)


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    import torch

    for key in ("state_dict", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in named if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) > MAX_TENSORS:
        raise UserError(f"{printable(path)} holds no model: no dictionary of tensors was found in it")
    return tensors


def _read_legacy(path: Path) -> object:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever the bytes lead it to; the file is a stranger's.
    except Exception as error:  # noqa: BLE001
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise UserError(
            f"{printable(path)} could not be read without running code from it ({reason}); "
            f"get the model as .safetensors"
        ) from None


def _read_archive(path: Path, archive: zipfile.ZipFile) -> object:
    pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError(f"{printable(path)} is a zip archive, but not one of torch's")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(f"{printable(path)}: its pickle has {pickles[0].file_size} bytes, which is not sensible")
    storages = _Storages(path, archive, pickles[0].filename.removesuffix("data.pkl"))
    return _Machine(storages).run(archive.read(pickles[0]))


class _Storages:
    """The raw bytes of an archive's storages, mapped, so that only what is used is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        self._infos = {info.filename: info for info in archive.infolist()}
        self._prefix = prefix
        if f"{prefix}byteorder" in self._infos and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("big-endian")
        with path.open("rb") as file:
            # A private copy-on-write mapping: torch takes it for writable memory, the file stays as it is.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self, key: str, dtype: torch.dtype) -> Tensor:
        import torch

        info = self._infos[f"{self._prefix}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("its tensors are compressed")
        # The local header repeats the name and may carry other extra bytes than the directory at the end.
        name, extra = (
            int.from_bytes(self._map[info.header_offset + i : info.header_offset + i + 2], "little") for i in (26, 28)
        )
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > len(self._map):
            raise ValueError("a tensor lies beyond its end")
        count = info.file_size // dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)


@dataclass(slots=True)
class _Inert:
    """Stands for any object or callable that is neither tensor nor container. It does nothing."""

    name: str = ""


@dataclass(slots=True, frozen=True)
class _Global:
    name: str


@dataclass(slots=True, frozen=True)
class _Storage:
    tensor: Any


class _Mark:
    pass


@dataclass(slots=True)
class _Machine:
    """An interpreter of pickle's opcodes that imports nothing and calls nothing."""

    storages: _Storages
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, data: bytes) -> object:
        """The object that the pickle `data` describes, strangers replaced by inert stand-ins."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        else:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise ValueError(f"pickle opcode {name} has no place in a model")
            handler(self, argument)

    def pop_mark(self) -> list[Any]:
        """What lies above the topmost mark, which goes as well."""
        for position in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[position], _Mark):
                above = self.stack[position + 1 :]
                del self.stack[position:]
                return above
        raise ValueError("the pickle has no mark where one is needed")

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def global_(self, name: str) -> None:
        self.stack.append(_Global(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Global(f"{module} {name}" if isinstance(name, str) and isinstance(module, str) else ""))

    def reduce(self) -> None:
        """A call, which happens only if it makes a tensor or a container."""
        arguments, called = self.stack.pop(), self.stack.pop()
        name = called.name if isinstance(called, _Global) else ""
        if name in _CONTAINERS:
            self.stack.append({})
        elif name in _REBUILDERS and isinstance(arguments, tuple):
            self.stack.append(_rebuild(*arguments[:4]))
        elif name == "torch._utils _rebuild_parameter" and isinstance(arguments, tuple):
            self.stack.append(arguments[0])
        else:
            self.stack.append(_Inert(name))

    def persistent(self) -> None:
        """A storage: ("storage", type, key, device, length)."""
        import torch

        described = self.stack.pop()
        if not isinstance(described, tuple) or len(described) < 3 or described[0] != "storage":
            raise ValueError("a storage is described in an unknown way")
        kind = described[1].name if isinstance(described[1], _Global) else ""
        word = _STORAGES.get(kind.rpartition(" ")[2])
        if word is None or not kind.startswith("torch"):
            raise ValueError(f"storages of type {kind or 'unknown'} cannot be read")
        self.stack.append(_Storage(self.storages.get(str(described[2]), getattr(torch, word))))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            # A key of nested containers could be made to hash for ever; names of tensors are text.
            keyed = zip(pairs[::2], pairs[1::2], strict=True)
            target.update({key: value for key, value in keyed if isinstance(key, str | int)})

    def append(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def drop(self, count: int, replacement: object) -> None:
        del self.stack[len(self.stack) - count :]
        self.stack.append(replacement)


def _rebuild(storage: object, offset: object, size: object, stride: object) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise ValueError("a tensor is described in an unknown way")
    sides = [side for group in (size, stride) if isinstance(group, tuple) for side in group]
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 8:
        raise ValueError("a tensor is described in an unknown way")
    if offset < 0 or any(not isinstance(side, int) or side < 0 for side in sides):
        raise ValueError("a tensor has a negative size")
    # Overlapping strides would let a small file announce a huge tensor.
    count = 1
    for side in size:
        count *= side
    if count > storage.tensor.numel():
        raise ValueError("a tensor is larger than its storage")
    return storage.tensor.as_strided(size, stride, offset)  # type: ignore[no-any-return]


_IGNORED = {"PROTO", "FRAME"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_HANDLERS: dict[str, Any] = {
    "MARK": lambda m, a: m.stack.append(_Mark()),
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_SET": lambda m, a: m.stack.append(_Inert("set")),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.drop(1, tuple(m.stack[-1:])),
    "TUPLE2": lambda m, a: m.drop(2, tuple(m.stack[-2:])),
    "TUPLE3": lambda m, a: m.drop(3, tuple(m.stack[-3:])),
    "LIST": lambda m, a: m.stack.append(m.pop_mark()),
    "DICT": lambda m, a: (pairs := m.pop_mark(), m.stack.append({}), m.set_items(pairs)),
    "FROZENSET": lambda m, a: (m.pop_mark(), m.stack.append(_Inert("frozenset"))),
    "SETITEM": lambda m, a: (value := m.stack.pop(), key := m.stack.pop(), m.set_items([key, value])),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, a: m.pop_mark(),
    "BINPUT": lambda m, a: m.put(a),
    "LONG_BINPUT": lambda m, a: m.put(a),
    "PUT": lambda m, a: m.put(a),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "GET": lambda m, a: m.stack.append(m.memo[a]),
    "GLOBAL": lambda m, a: m.global_(a),
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.drop(2, _Inert()),
    "NEWOBJ_EX": lambda m, a: m.drop(3, _Inert()),
    "INST": lambda m, a: (m.pop_mark(), m.stack.append(_Inert(a))),
    "OBJ": lambda m, a: (m.pop_mark(), m.stack.append(_Inert())),
    "BUILD": lambda m, a: m.stack.pop(),
    "BINPERSID": lambda m, a: m.persistent(),
}
