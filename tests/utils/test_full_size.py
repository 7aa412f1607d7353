"""Models at full size with random weights: both layouts, both ways, to the bit; and what a save costs."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from starter.tokenizer import write_tokenizer
from tests.utils.tiny_models import tensors_of
from utils import export
from utils.convert import convert
from utils.keymap import disk_name
from utils.model_files import ModelFiles
from utils.models import describe, empty_networks, load_models
from utils.presets import preset
from utils.seeding import tensor_stream
from utils.source import Wanted
from utils.tensor_writer import Piece, write_tensors
from utils.weights import read_safetensors

pytestmark = pytest.mark.slow
GIB = 1 << 30


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder for 20 GB, which are not kept as pytest keeps its own."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def random_tensor(part: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that depends on its name, so that a swap of two would show."""
    return torch.rand(shape, generator=tensor_stream(0, "full size", part, name)).sub_(0.5).mul_(0.1)


def full_size_folder(folder: Path, kind: str) -> Path:
    """A Diffusers folder of random fp32 weights, never in memory as a whole."""
    files = preset(kind, "v_prediction" if kind == "sd2" else "epsilon")
    networks = empty_networks(files)
    export.write_folder(folder, {part: {} for part in networks}, files_with_tokenizer(files, folder))
    for part, network in networks.items():
        pieces = [
            Piece(disk_name(part, name), tuple(t.shape), partial(random_tensor, part, name, tuple(t.shape)))
            for name, t in network.state_dict().items()
        ]
        write_tensors(folder / part / export.FILE_NAMES[part], pieces, torch.float32, {"format": "pt"})
    return folder


def files_with_tokenizer(files: ModelFiles, folder: Path) -> ModelFiles:
    scratch = folder.parent / "tokenizer of the starter"
    write_tokenizer(scratch)
    return replace(files, tokenizer={path.name: path.read_bytes() for path in scratch.iterdir()})


def same_tensors(one: Path, other: Path) -> bool:
    a, b = read_safetensors(one), read_safetensors(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_full_size_round_trips_are_exact(kind: str, room: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = full_size_folder(room / "folder", kind)
    single = room / "single.safetensors"
    convert(str(folder), single, fp32=True)
    assert len(read_safetensors(single)) == (1130 if kind == "sd1" else 1215)  # SD 2: with the marker v_pred

    def assert_diffusers_reads(pipeline: StableDiffusionPipeline) -> None:
        for part in export.FILE_NAMES:
            expected = read_safetensors(folder / part / export.FILE_NAMES[part])
            found = {disk_name(part, name): tensor for name, tensor in getattr(pipeline, part).state_dict().items()}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    assert_diffusers_reads(StableDiffusionPipeline.from_single_file(single, config=str(folder), local_files_only=True))
    convert(str(single), room / "back", wanted=Wanted(model_config=str(folder)), fp32=True)
    for part, name in export.FILE_NAMES.items():
        assert same_tensors(folder / part / name, room / "back" / part / name)
    assert_diffusers_reads(StableDiffusionPipeline.from_pretrained(room / "back"))
    convert(str(room / "back"), room / "again.safetensors", fp32=True)
    assert same_tensors(single, room / "again.safetensors")
    # Without a folder to describe it, the file is recognised by its own shape.
    shutil.copytree(folder / "tokenizer", room / "tokenizer")
    models = load_models(single)
    assert (models.kind, models.prediction_type) == (kind, "epsilon" if kind == "sd1" else "v_prediction")


def resident_bytes() -> int:
    """Anonymous memory of this process: what the page cache holds for everybody is not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time, with nothing left over for the disk from what came before."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_of(work: Callable[[], object]) -> int:
    """How many bytes of memory `work` added at its highest; the watching slows it, so it is not timed."""
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(0, peak - before)


def test_a_save_of_a_full_size_model_is_quick_and_lean(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = load_models(full_size_folder(room / "folder", "sd1"))
    shutil.rmtree(room / "folder")
    weights, files = tensors_of(models), describe(models)
    flat = {f"{part}.{name}": tensor for part, tensors in weights.items() for name, tensor in tensors.items()}
    model_bytes = sum(tensor.numel() * 4 for tensor in flat.values())
    path, theirs = room / "ours.safetensors", room / "theirs.safetensors"
    lines, ratios = [], []
    for dtype in (torch.float16, torch.float32):
        ours_seconds, cast_seconds, theirs_seconds = [], [], []
        for _ in range(3):
            start = time.perf_counter()
            ready = {name: tensor.to(dtype) for name, tensor in flat.items()}
            cast_seconds.append(time.perf_counter() - start)
            theirs.unlink(missing_ok=True)
            theirs_seconds.append(seconds_of(partial(save_file, ready, theirs)))
            del ready
            path.unlink(missing_ok=True)
            writing = partial(export.write_single_file, path, weights, files, dtype=dtype)
            ours_seconds.append(seconds_of(writing))
        proving = partial(export.check_single_file, path, weights, files, dtype)
        checking, check_peak, peak = seconds_of(proving), peak_of(proving), peak_of(writing)
        ours, cast, save = map(min, (ours_seconds, cast_seconds, theirs_seconds))  # the least disturbed
        size = path.stat().st_size / 1e9
        lines.append(
            f"{dtype}: {size:.2f} GB in {ours:.2f} s ({size / ours:.2f} GB/s); casting all {cast:.2f} s and "
            f"safetensors.torch.save_file {save:.2f} s: ratio {ours / (cast + save):.2f}, of save_file alone "
            f"{ours / save:.2f}; peak +{peak / GIB:.2f} GiB; read back, compared and hashed in {checking:.2f} s, "
            f"peak +{check_peak / GIB:.2f} GiB"
        )
        ratios.append(ours / (cast + save))
        assert max(peak, check_peak) <= model_bytes + GIB
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert max(ratios) <= 1.3
