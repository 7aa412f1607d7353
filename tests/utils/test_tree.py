"""Any state comes back bit for bit, of its own type, with nothing aliased."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.manifest import DamagedError
from utils.tree import is_saved, load_tree, on_cpu, same_tree, save_tree, snapshot, tree_bytes

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Tensors of any dtype and shape whose bits are arbitrary, among them NaNs with odd payloads."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape)


leaves = st.one_of(
    tensors(),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc", "So"])),
)
keys = st.one_of(st.text(), st.integers())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


@given(tree=trees)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, tree: Any) -> None:
    save_tree(tmp_path, "state", tree)
    assert same_tree(load_tree(tmp_path, "state"), tree)
    assert is_saved(tmp_path, "state", tree)
    assert same_tree(snapshot(tree), tree)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ([1], (1,)), ({"1": 0}, {1: 0}), ({"a": 0, "b": 1}, {"b": 1, "a": 0}),
        (torch.zeros(1), torch.zeros(())), (torch.zeros(2), -torch.zeros(2)), (torch.zeros(1), torch.zeros(1).half()),
        (torch.zeros(1), 0.0), (None, 0), ("", None),
    ],
)  # fmt: skip
def test_what_differs_is_told_apart(tmp_path: Path, a: Any, b: Any) -> None:
    assert same_tree(a, a)
    assert not same_tree(a, b)
    save_tree(tmp_path, "state", {"x": [a]})
    assert is_saved(tmp_path, "state", {"x": [a]})
    # Another kind of container is no answer but an error.
    with suppress(DamagedError):
        assert not is_saved(tmp_path, "state", {"x": [b]})


def test_big_and_special_numbers_and_keys(tmp_path: Path) -> None:
    tree = {1: 2**4000, "1": -(2**63), "inf": -math.inf, "nan": math.nan, "tiny": 5e-324, "zero": -0.0, -3: []}
    save_tree(tmp_path, "state", tree)
    loaded = load_tree(tmp_path, "state")
    assert same_tree(loaded, tree)
    assert list(loaded) == list(tree)
    json.loads((tmp_path / "state.json").read_text(), parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))


def test_views_aliases_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    weight = torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
    tree = {"base": base, "again": base, "turned": base.T, "part": base[1:, ::2], "one": weight, "two": weight}
    save_tree(tmp_path, "state", tree)
    loaded = load_tree(tmp_path, "state")
    assert same_tree(loaded, tree)
    assert not loaded["one"].requires_grad
    loaded["base"].zero_()
    assert loaded["again"].sum() == 66, "what is loaded is never shared"
    stored = (tmp_path / "state.safetensors").stat().st_size
    assert stored < 2000 + base.nbytes * 3, "the same tensor is stored once"


def test_snapshot_is_not_touched_by_training() -> None:
    weight = torch.ones(3)
    state = {"weight": weight, "nested": [(weight[:2],)]}
    copy = snapshot(state)
    weight.add_(1)
    assert copy["weight"].tolist() == [1, 1, 1]
    assert copy["nested"][0][0].tolist() == [1, 1]
    assert tree_bytes(state) == 20


def test_what_lies_on_the_cpu_is_not_copied() -> None:
    tree: Any = {"a": [torch.ones(2)], "b": (1, "x")}
    moved = on_cpu(tree)
    assert same_tree(moved, tree)
    assert moved["a"][0].data_ptr() == tree["a"][0].data_ptr()


def test_numbers_at_odd_addresses(tmp_path: Path) -> None:
    """torch crashes the whole process when it copies complex numbers that lie there."""
    tree = {f"{n}": torch.arange(n).to(torch.complex128) for n in range(1, 40)} | {"0": torch.zeros(3).bool()}
    save_tree(tmp_path, "state", tree)
    assert is_saved(tmp_path, "state", tree)
    assert same_tree(load_tree(tmp_path, "state"), tree)


def test_optimizer_state_trains_on_as_before(tmp_path: Path) -> None:
    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    def build() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = build()
    step(model, optimizer)
    save_tree(tmp_path, "state", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = build()
    loaded = load_tree(tmp_path, "state")
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    for each in ((model, optimizer), (other, other_optimizer)):
        step(*each)
    assert same_tree(other.state_dict(), dict(model.state_dict()))
    assert same_tree(other_optimizer.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("bad", [object(), {True: 1}, {1.5: 1}, {"a": {1, 2}}, [b"bytes"]])
def test_what_cannot_be_saved_is_our_mistake(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(AssertionError):
        save_tree(tmp_path, "state", bad)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '{"tree_version": 2, "tree": 1}', '{"tree_version": 1}', "[" * 100000,
     '{"tree_version": 1, "tree": {"tensor": "x", "dtype": "float32", "shape": [1]}}',
     '{"tree_version": 1, "tree": {"tensor": "a", "dtype": "save", "shape": [1]}}',
     '{"tree_version": 1, "tree": {"tensor": "a", "dtype": "float64", "shape": [7]}}',
     '{"tree_version": 1, "tree": {"dict": 5}}', '{"tree_version": 1, "tree": {"dict": [[[], 1]]}}',
     '{"tree_version": 1, "tree": {"int": "zz"}}', '{"tree_version": 1, "tree": {"float": "00"}}'],
)  # fmt: skip
def test_strange_files_are_told_not_run(tmp_path: Path, text: str) -> None:
    save_tree(tmp_path, "state", {"a": torch.zeros(2)})
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DamagedError, match="state"):
        load_tree(tmp_path, "state")


def test_cut_tensors_are_told(tmp_path: Path) -> None:
    save_tree(tmp_path, "state", {"a": torch.zeros(100)})
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError):
        load_tree(tmp_path, "state")
