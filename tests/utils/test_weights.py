"""Weight files that are broken or meant to break something: an error in words for each, and no code run."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from utils.errors import UserError
from utils.pickles import read_pickle
from utils.seeding import stream
from utils.weight_files import folder_weights, read_weights
from utils.weights import read_safetensors

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16)}


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trap, "sprung")


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors file, or is cut short"),
    "seven bytes": (b"1234567", "no safetensors file, or is cut short"),
    "header past the end": (struct.pack("<Q", 1 << 20) + b"{}", "cut short"),
    "header beyond all numbers": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "cut short"),
    "not JSON": (with_header(b"{'a': 1}"), "no JSON"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "no JSON"),
    "a list": (with_header([1, 2]), "lists no tensors"),
    "nested for ever": (with_header(b'{"a":' * 50_000), "no JSON"),
    "too many tensors": (with_header({f"{i}": entry([0], 0, 0) for i in range(20_001)}), "more than 20000"),
    "offsets past the end": (with_header({"a": entry([4], 0, 16)}, b"\0" * 8), "damaged"),
    "shape and offsets differ": (with_header({"a": entry([400], 0, 16)}, b"\0" * 16), "damaged"),
    "offsets backwards": (with_header({"a": entry([4], 16, 0)}, b"\0" * 16), "damaged"),
    "overlap": (with_header({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"\0" * 24), "damaged"),
    "shape that overflows": (with_header({"a": entry([1 << 40, 1 << 40], 0, 16)}, b"\0" * 16), "damaged"),
    "negative side": (with_header({"a": entry([-4], 0, 16)}, b"\0" * 16), "damaged"),
    "unknown type": (with_header({"a": entry([4], 0, 16, "Q99")}, b"\0" * 16), "damaged"),
    "entry is no table": (with_header({"a": 3}), "damaged"),
    "metadata is no text": (with_header({"__metadata__": {"a": 3}}), "damaged"),
    "a pickle by another name": (pickle.dumps(TENSORS["b"].tolist()), "no safetensors file|cut short"),
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_broken_safetensors_are_refused(name: str, tmp_path: Path) -> None:
    content, match = BROKEN_SAFETENSORS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_safetensors(path)


def test_a_header_of_90_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)
    with pytest.raises(UserError, match="announces a header of 94371840 bytes"):
        read_safetensors(path)


def test_names_that_look_like_paths_are_only_names(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    path = tmp_path / "x/model.safetensors"
    path.write_bytes(save({"../../escaped": torch.ones(1), "/etc/x": torch.ones(1)}))
    assert set(read_safetensors(path)) == {"../../escaped", "/etc/x"}
    assert [found.name for found in tmp_path.rglob("*")] == ["x", "model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_pipe_does_not_hang_the_reader(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        read_weights(path)


def test_a_file_of_another_user_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS))
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may read everything
    with pytest.raises(UserError, match="belongs to another user"):
        read_weights(path)


def test_an_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    (part / "diffusion_pytorch_model-00001-of-00001.safetensors").write_bytes(save(TENSORS))
    for name in ("../secret.safetensors", "/etc/passwd", "..", "a\\b", 3, ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="not a file beside it"):
            folder_weights(part, "unet", None)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(UserError, match="no index of weight files"):
        folder_weights(part, "unet", None)


# Pickles


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages if storages is not None else {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def torch_archive(path: Path, content: object) -> tuple[bytes, dict[str, bytes]]:
    """What torch writes for `content`: the pickle and the storages."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
        storages = {name.rpartition("/")[2]: file.read(name) for name in file.namelist() if "/data/" in name}
    return pickled, storages


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_pickled_tensors_are_read_as_torch_reads_them(legacy: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(60).to(dtype).reshape(5, 12)
    views = {
        "whole": base,
        "slice": base[1:3],
        "turned": base.T,
        "scalar": base[0, 0],
        "empty": torch.empty(0).to(dtype),
    }
    path = tmp_path / "x.bin"
    torch.save(views, path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_pickle(path), views)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()}
    torch.save({"state_dict": parameters, "epoch": 3}, path, pickle_protocol=protocol)
    assert_same(read_pickle(path), {name: parameter.detach() for name, parameter in parameters.items()})


@pytest.mark.parametrize("place", ["beside", "inside", "key", "instead"])
def test_code_in_a_checkpoint_is_not_run(place: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    payload = Payload(trap)
    contents: dict[str, object] = {
        "beside": {"callbacks": payload, "state_dict": TENSORS},
        "inside": {"state_dict": {**TENSORS, "evil": payload}},
        "key": {"state_dict": TENSORS, ("deep", payload): 1},
        "instead": payload,
    }
    path = tmp_path / "x.ckpt"
    torch.save(contents[place], path)
    if place == "instead":
        with pytest.raises(UserError, match="holds no model"):
            read_pickle(path)
    else:
        assert_same(read_pickle(path), TENSORS)
    assert not trap.exists()
    with path.open("rb") as file:  # the trap is a real one
        torch.load(file, weights_only=False)
    assert trap.exists()


def test_code_in_a_legacy_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({**TENSORS, "x": Payload(tmp_path / "sprung")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="without running code"):
        read_pickle(path)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "sprung")))
    with pytest.raises(UserError, match="without running code"):
        read_pickle(path)
    assert not (tmp_path / "sprung").exists()


def raw(*lines: bytes) -> Callable[[Path], bytes]:
    return lambda trap: b"".join(lines).replace(b"TRAP", str(trap).encode())


HAND_WRITTEN = {
    "INST": raw(b"(S'touch TRAP'\nios\nsystem\n."),
    "OBJ": raw(b"(cos\nsystem\nS'touch TRAP'\no."),
    "GLOBAL and REDUCE": raw(b"cos\nsystem\n(S'touch TRAP'\ntR."),
    "STACK_GLOBAL": raw(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch TRAP\x85R."),
    "NEWOBJ": raw(b"\x80\x02csubprocess\nPopen\n(S'touch'\nS'TRAP'\ntt\x81."),
    "BUILD": raw(b"\x80\x02}S'a'\nK\x01s(cos\nsystem\nS'touch TRAP'\nob."),
    "EXT": raw(b"\x80\x02\x82\x01."),
    "PERSID": raw(b"Pos.system\n."),
    "persistent of a stranger": raw(b"(S'x'\ncos\nsystem\nS'0'\nNK\x01tQ."),
    "memo bomb": raw(b"\x80\x02K\x01r\xff\xff\xff\x7f0j\xff\xff\xff\x7f."),
    "missing memo": raw(b"\x80\x02h\x07."),
    "empty stack": raw(b"\x80\x020."),
    "no mark": raw(b"\x80\x02t."),
    "endless length": raw(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc."),
    "no end": raw(b"\x80\x02}"),
    "nested tuples": raw(b"\x80\x04)" + b"\x85\x86" * 3 + b"."),
    "nested for ever": raw(b"\x80\x04)" + b"\x85" * 200_000 + b"."),
    "doubling": raw(b"\x80\x04)" + b"2\x86" * 5_000 + b"."),
    "doubling as a key": raw(b"\x80\x04})" + b"2\x86" * 5_000 + b"K\x01s."),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pickles_do_nothing(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    path = archive(tmp_path / "x.ckpt", HAND_WRITTEN[name](trap))
    with pytest.raises(UserError):
        read_pickle(path)
    assert not trap.exists()


def tensor_call(size: tuple[int, ...], stride: tuple[int, ...], offset: int, key: str = "0") -> bytes:
    """A pickled dictionary of one tensor with these numbers over the storage `key`."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", 4) if obj == "STORAGE" else None

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, size, stride, False, {})

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": Call()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset", "key"),
    [
        ((1 << 40,), (0,), 0, "0"),
        ((1 << 31, 1 << 31, 1 << 31), (1, 1, 1), 0, "0"),
        ((4,), (1,), 1, "0"),
        ((4,), (1,), -4, "0"),
        ((4,), (-1,), 0, "0"),
        ((-4,), (1,), 0, "0"),
        ((2, 2), (1 << 62, 1), 0, "0"),
        ((2, 2), (1,), 0, "0"),
        ((4,), (1,), 0, "9"),
        ((4,), (1,), 0, "../data.pkl"),
        ((1,) * 99, (1,) * 99, 0, "0"),
    ],
)
def test_tensors_reach_no_memory_but_their_storage(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, key: str, tmp_path: Path
) -> None:
    assert read_pickle(archive(tmp_path / "good.ckpt", tensor_call((4,), (1,), 0), {"0": b"\0" * 16}))["x"].shape == (
        4,
    )
    path = archive(tmp_path / "x.ckpt", tensor_call(size, stride, offset, key), {"0": b"\0" * 16})
    with pytest.raises(UserError, match="is damaged"):
        read_pickle(path)


def test_archives_that_blow_up_are_refused(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb.ckpt", b"\0" * (65 << 20), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="not sensible"):
        read_pickle(bomb)
    squeezed = archive(tmp_path / "x.ckpt", tensor_call((4,), (1,), 0), {"0": b"\0" * (1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_pickle(squeezed)
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as file:
        file.writestr("readme.txt", "no model")
    with pytest.raises(UserError, match="not one of torch's"):
        read_pickle(tmp_path / "other.ckpt")


def test_damage_anywhere_is_an_error_in_words(tmp_path: Path) -> None:
    """Bytes changed, cut and doubled at random: tensors or a UserError come out, nothing else."""
    pickled, storages = torch_archive(tmp_path / "x.ckpt", {"state_dict": TENSORS, "callbacks": {Path: Path("x")}})
    assert len(list(pickletools.genops(pickled))) > 50
    whole = save(TENSORS)
    path = tmp_path / "y"
    outcomes = set()
    for number in range(400):
        draw = stream(1, "damage", number)
        target = pickled if number % 2 else whole
        at = draw.randrange(len(target))
        change = draw.choice([bytes([draw.randrange(256)]), b"", target[at : at + 9] * 2])
        damaged = target[:at] + change + target[at + draw.choice([1, 1, 5]) :]
        try:
            if number % 2:
                read_pickle(archive(path.with_suffix(".ckpt"), damaged, storages))
            else:
                path.with_suffix(".safetensors").write_bytes(damaged)
                read_safetensors(path.with_suffix(".safetensors"))
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
