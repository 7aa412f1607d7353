"""Nested state (dicts, lists, tuples, numbers, text, tensors) in a JSON file and a safetensors file; no pickle."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from utils.errors import printable
from utils.manifest import DamagedError

Tree = Any
"""A tensor, int, float, bool, str or None, or a dict (keys str or int), list or tuple of trees."""

TREE_VERSION = 1
_PLAIN_INT = 2**53


class _Writer:
    """Turns a tree into JSON, in which every object is a tag, and collects its tensors by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()
        self._names: dict[tuple[Any, ...], str] = {}

    def node(self, tree: Tree, path: str) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._tensor(tree.detach(), path)
        if isinstance(tree, dict):
            return {"dict": [[self._key(k), self.node(v, f"{path}/{k}")] for k, v in tree.items()]}
        if isinstance(tree, list):
            return [self.node(item, f"{path}/{i}") for i, item in enumerate(tree)]
        if type(tree) is tuple:
            return {"tuple": [self.node(item, f"{path}/{i}") for i, item in enumerate(tree)]}
        return self._scalar(tree, path)

    def _key(self, key: Any) -> Any:
        assert type(key) is not bool, "True as a key of state would come back as 1"
        assert isinstance(key, str | int), f"a key of state must be text or int: {key!r}"
        return self._scalar(key, "key")

    @staticmethod
    def _scalar(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            # JSON would join two lone surrogates (bytes of file names that are no UTF-8) into one character.
            odd = any("\ud800" <= c <= "\udfff" for c in value)
            return {"text": value.encode("utf-8", "surrogatepass").hex()} if odd else value
        if isinstance(value, int):
            # Other readers of JSON round what does not fit a double, and Python refuses very long numerals.
            return value if abs(value) <= _PLAIN_INT else {"int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        raise AssertionError(f"state at {path} holds a {type(value).__name__}, which cannot be saved")

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        assert tensor.layout is torch.strided, f"state at {path} is no dense tensor"
        assert not tensor.is_meta, f"state at {path} has no numbers yet"
        assert not tensor.is_quantized, f"state at {path} is quantized"
        # The address tells tensors apart because the tree keeps every one of them alive.
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        name = self._names.get(same) if tensor.numel() else None
        if name is None:
            stored = tensor.cpu().resolve_conj().resolve_neg().contiguous()
            # safetensors wants storages of their own; the whole storage of a small view must not be kept, either.
            storage = stored.untyped_storage()
            if storage.data_ptr() in self._storages or storage.nbytes() != stored.nbytes:
                stored = stored.clone()
            self._storages.add(stored.untyped_storage().data_ptr())
            name = self._unique(path)
            # As bytes, because safetensors does not know every dtype; the tag says what they are.
            self.tensors[name] = stored if stored.dtype in _NATIVE else stored.reshape(-1).view(torch.uint8)
            self._names[same] = name
        return {"tensor": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    def _unique(self, path: str) -> str:
        name = printable(path.removeprefix("/")) or "tensor"
        return name if name not in self.tensors else f"{name}#{len(self.tensors)}"


_NATIVE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)


def save_tree(folder: Path, name: str, tree: Tree) -> None:
    """Write `tree` to `<folder>/<name>.json` and `<folder>/<name>.safetensors` (neither synced nor atomic).

    Bits are kept, also of inf, NaN and integers of any size; tensors come back on the CPU, without gradients. A tensor
    that stands in several places is stored once.
    """
    from safetensors.torch import save_file

    writer = _Writer()
    document = {"tree_version": TREE_VERSION, "tree": writer.node(tree, "")}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=True), encoding="ascii")
    save_file(writer.tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})


def load_tree(folder: Path, name: str) -> Tree:
    """What `save_tree` wrote; raises DamagedError where the files hold something else."""
    return _with_saved(folder, name, _read)


def is_saved(folder: Path, name: str, tree: Tree) -> bool:
    """Whether `save_tree` has written exactly `tree`, compared tensor by tensor without a second copy in memory.

    Raises DamagedError where the files hold no state at all.
    """
    return bool(_with_saved(folder, name, lambda node, tensors: _same(node, tensors, tree)))


def _with_saved(folder: Path, name: str, use: Callable[[Any, Any], Tree]) -> Tree:
    from safetensors import SafetensorError, safe_open

    try:
        document = json.loads((folder / f"{name}.json").read_bytes().decode("ascii"))
        if document["tree_version"] != TREE_VERSION:
            raise DamagedError(f"{printable(folder / name)}.json has an unknown version")
        with safe_open(folder / f"{name}.safetensors", framework="pt", device="cpu") as tensors:
            return use(document["tree"], tensors)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DamagedError(f"{printable(folder / name)} does not hold saved state: {printable(error)}") from error
    except (RuntimeError, RecursionError, OverflowError, struct.error, SafetensorError) as error:
        raise DamagedError(f"{printable(folder / name)} does not hold saved state: {printable(error)}") from error


def _read(node: Any, tensors: Any) -> Tree:
    if isinstance(node, list):
        return [_read(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "dict" in node:
        return {_read(key, tensors): _read(value, tensors) for key, value in node["dict"]}
    if "tuple" in node:
        return tuple(_read(item, tensors) for item in node["tuple"])
    if "int" in node:
        return int(node["int"], 16)
    if "text" in node:
        return bytes.fromhex(node["text"]).decode("utf-8", "surrogatepass")
    if "float" in node:
        return struct.unpack(">d", bytes.fromhex(node["float"]))[0]
    # A copy, because safe_open maps the file: the state must not change or vanish with it. Of the bytes, because they
    # may lie at any address, and torch crashes on complex numbers at odd ones.
    tensor = _mapped(node, tensors)
    return _raw(tensor).clone().view(tensor.dtype).reshape(tensor.shape)


def _same(node: Any, tensors: Any, tree: Tree) -> bool:
    if isinstance(tree, torch.Tensor):
        return isinstance(node, dict) and "tensor" in node and same_tree(_mapped(node, tensors), tree)
    if isinstance(tree, dict):
        pairs = node["dict"]
        keys = [_read(key, tensors) for key, _ in pairs]
        values = [value for _, value in pairs]
        return same_tree(keys, list(tree)) and all(map(_same, values, repeat(tensors), tree.values()))
    if isinstance(tree, list | tuple):
        items = node if isinstance(tree, list) else node["tuple"]
        return len(items) == len(tree) and all(map(_same, items, repeat(tensors), tree))
    return same_tree(_read(node, tensors), tree)


def _mapped(node: dict[str, Any], tensors: Any) -> torch.Tensor:
    dtype = getattr(torch, node["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{node['dtype']!r} is no dtype")
    stored: torch.Tensor = tensors.get_tensor(node["tensor"])
    if stored.dtype != dtype:
        stored = stored.view(dtype)
    return stored.reshape(node["shape"])


def snapshot(tree: Tree) -> Tree:
    """A copy of `tree` with tensors on the CPU in memory of their own, so that a thread may write it at leisure."""
    return _with_tensors(tree, lambda tensor: tensor.to("cpu", copy=True))


def on_cpu(tree: Tree) -> Tree:
    """`tree` with its tensors on the CPU; those that are there already are not copied."""
    return _with_tensors(tree, lambda tensor: tensor.to("cpu"))


def _with_tensors(tree: Tree, change: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
    if isinstance(tree, torch.Tensor):
        return change(tree.detach())
    if isinstance(tree, dict):
        return {key: _with_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_tensors(item, change) for item in tree]
    if isinstance(tree, tuple):
        return tuple(_with_tensors(item, change) for item in tree)
    return tree


def tree_bytes(tree: Tree) -> int:
    """The bytes that the tensors of `tree` fill."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    return sum(map(tree_bytes, tree)) if isinstance(tree, list | tuple) else 0


def same_tree(a: Tree, b: Tree) -> bool:
    """Whether two trees hold the same structure, types and bits (NaN equals the same NaN, 0.0 is not -0.0)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        alike = isinstance(a, list) == isinstance(b, list) and len(a) == len(b)
        return alike and all(map(same_tree, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return type(a) is type(b) and bool(a == b)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, flat."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
