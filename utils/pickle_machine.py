"""An interpreter of pickle's opcodes that imports nothing and calls nothing: tensors and containers, or stand-ins."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Given the key and the dtype of a storage, its numbers as a flat tensor.
Storages = Callable[[str, "torch.dtype"], "Tensor"]

_DTYPES = {
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
_TENSORS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"}
_DICTIONARIES = {"collections OrderedDict", "builtins dict", "__builtin__ dict"}
_MAX_DIMENSIONS = 8


@dataclass(slots=True, frozen=True)
class Named:
    """A class or function that a pickle names. It is never looked up."""

    name: str


@dataclass(slots=True, frozen=True)
class Inert:
    """Stands for an object that is neither tensor nor container. It does nothing."""


@dataclass(slots=True, frozen=True)
class Storage:
    """The numbers that tensors are views of."""

    numbers: Any


class _Mark:
    """Where a sequence on the stack begins."""


@dataclass(slots=True)
class Machine:
    """Runs one pickle.

    Args:
        storages: finds the numbers of tensors.
    """

    storages: Storages
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, data: bytes) -> object:
        """The object that the pickle `data` describes, strangers replaced by stand-ins.

        Raises `ValueError`, `KeyError`, `IndexError` or `TypeError` when it makes no sense, `RuntimeError` for tensors
        that reach beyond their storage.
        """
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            if not self._moves(opcode.name, argument) and not self._makes(opcode.name, argument):
                raise ValueError(f"pickle opcode {opcode.name} has no place in a model")
        raise ValueError("the pickle has no end")

    def _moves(self, name: str, argument: Any) -> bool:
        """Opcodes that put values on the stack, or shift them about; whether `name` is one."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_Mark())
            case "POP" | "BUILD":  # BUILD would set the state of the object below
                stack.pop()
            case "POP_MARK" | "ADDITEMS":  # ADDITEMS would fill a set, which is inert
                self._above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _:
                return False
        return True

    def _makes(self, name: str, argument: Any) -> bool:
        """Opcodes that make containers and objects; whether `name` is one."""
        stack = self.stack
        match name:
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Inert())
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(name[-1]))))
            case "LIST":
                stack.append(self._above_mark())
            case "DICT":
                pairs = self._above_mark()
                stack.append({})
                self._set_items(pairs)
            case "SETITEM":
                self._set_items(self._take(2))
            case "SETITEMS":
                self._set_items(self._above_mark())
            case "APPEND":
                self._extend(self._take(1))
            case "APPENDS":
                self._extend(self._above_mark())
            case "GLOBAL":
                stack.append(Named(argument))
            case "STACK_GLOBAL":
                stack.append(Named(" ".join(map(str, self._take(2)))))
            case "REDUCE":
                stack.append(_made(*self._take(2)))
            case "NEWOBJ" | "NEWOBJ_EX":
                self._take(3 if name == "NEWOBJ_EX" else 2)
                stack.append(Inert())
            case "INST" | "OBJ" | "FROZENSET":
                self._above_mark()
                stack.append(Inert())
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                return False
        return True

    def _take(self, count: int) -> list[Any]:
        """The topmost values, which leave the stack."""
        if len(self.stack) < count:
            raise IndexError("the pickle takes more than there is")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _above_mark(self) -> list[Any]:
        """What lies above the topmost mark; all of it leaves the stack, and the mark does."""
        for position in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[position], _Mark):
                above = self.stack[position + 1 :]
                del self.stack[position:]
                return above
        raise ValueError("the pickle has no mark where one is needed")

    def _set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            # A key of nested containers could be made to hash for ever; names of tensors are text.
            keyed = zip(pairs[::2], pairs[1::2], strict=True)
            target.update({key: value for key, value in keyed if isinstance(key, str | int)})

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _storage(self, described: object) -> Storage:
        """What torch pickles for a storage: ("storage", type, key, device, length)."""
        import torch

        if not isinstance(described, tuple) or len(described) < 3 or described[0] != "storage":
            raise ValueError("a storage is described in an unknown way")
        kind = described[1].name if isinstance(described[1], Named) else ""
        module, _, word = kind.partition(" ")
        if module not in ("torch", "torch.storage") or word not in _DTYPES:
            raise ValueError(f"storages of type {kind} cannot be read")
        return Storage(self.storages(str(described[2]), getattr(torch, _DTYPES[word])))


def _made(called: object, arguments: object) -> object:
    """What a call would return, if it is one that makes a tensor or a dictionary; nothing is called."""
    name = called.name if isinstance(called, Named) else ""
    if name in _DICTIONARIES:
        return {}
    if name in _TENSORS and isinstance(arguments, tuple):
        return _view(*arguments[:4])
    if name == "torch._utils _rebuild_parameter" and isinstance(arguments, tuple):
        return arguments[0]
    return Inert()


def _view(storage: object, offset: object, size: object, stride: object) -> Tensor:
    """A tensor of the storage's numbers, checked: torch believes what it is told here."""
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is described in an unknown way")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise ValueError("a tensor has no sensible number of dimensions")
    if any(not isinstance(number, int) or number < 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor has a negative size")
    count = 1
    for side in size:
        count *= side
    # Strides of zero would let a small file announce a huge tensor.
    if count > storage.numbers.numel():
        raise ValueError("a tensor is larger than its storage")
    return storage.numbers.as_strided(size, stride, offset)  # type: ignore[no-any-return]
