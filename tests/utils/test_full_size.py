"""Models at full size with random weights: both layouts, both ways, to the bit; and what a save costs."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import save_file

from starter.tokenizer import write_tokenizer
from tests.utils.tiny_models import tensors_of
from utils import export
from utils.archive import Archive
from utils.checkpoint import Progress
from utils.config import SaveOptions
from utils.convert import convert
from utils.keymap import disk_name
from utils.model_files import ModelFiles
from utils.models import Models, describe, empty_networks, load_models
from utils.presets import preset
from utils.run_dir import RunDir
from utils.seeding import tensor_stream
from utils.source import Wanted
from utils.tensor_writer import Piece, write_tensors
from utils.weights import read_safetensors
from utils.writer import CheckpointWriter

pytestmark = pytest.mark.slow
GIB = 1 << 30
PAIRS = 7


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
    gc.collect()
    with suppress(AttributeError, OSError):  # only glibc keeps freed memory, and only it can be asked to let go
        ctypes.CDLL(None).malloc_trim(0)
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


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A full-size SD 1.5 of random weights in memory, its folder gone."""
    home = tmp_path_factory.mktemp("live")
    models = load_models(full_size_folder(home / "folder", "sd1"))
    shutil.rmtree(home)
    return models


def model_bytes(models: Models) -> int:
    return sum(t.numel() * 4 for tensors in tensors_of(models).values() for t in tensors.values())


def test_a_single_file_is_written_quickly_and_without_a_copy(
    live: Models, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, files = tensors_of(live), describe(live)
    flat = {f"{part}.{name}": tensor for part, tensors in weights.items() for name, tensor in tensors.items()}
    path, theirs = room / "ours.safetensors", room / "theirs.safetensors"
    lines, ratios = [], []
    for dtype in (torch.float16, torch.float32):
        writing = partial(export.write_single_file, path, weights, files, dtype=dtype)

        def cast_and_save(dtype: torch.dtype = dtype) -> None:
            save_file({name: tensor.to(dtype) for name, tensor in flat.items()}, theirs)

        def ours_seconds(writing: Callable[[], object] = writing) -> float:
            path.unlink(missing_ok=True)
            return seconds_of(writing)

        def theirs_seconds(work: Callable[[], object] = cast_and_save) -> float:
            theirs.unlink(missing_ok=True)
            return seconds_of(work)

        ours_seconds(), theirs_seconds()  # the first ones find their room in the page cache
        # Taking turns at being first: whoever else uses the machine disturbs both alike.
        pairs = []
        for number in range(PAIRS):
            first, second = (ours_seconds, theirs_seconds) if number % 2 else (theirs_seconds, ours_seconds)
            one, other = first(), second()
            pairs.append((one, other) if number % 2 else (other, one))
        ours, save = (median(column) for column in zip(*pairs, strict=True))
        proving = partial(export.check_single_file, path, weights, files, dtype)
        checking, check_peak, peak = seconds_of(proving), peak_of(proving), peak_of(writing)
        size = path.stat().st_size / 1e9
        ratios.append(median(one / other for one, other in pairs))
        lines.append(
            f"{dtype}: {size:.2f} GB in {ours:.2f} s ({size / ours:.2f} GB/s); cast and safetensors.torch.save_file "
            f"{save:.2f} s; ratio {ratios[-1]:.2f} ({', '.join(f'{one / other:.2f}' for one, other in pairs)}); peak "
            f"+{peak / GIB:.2f} GiB; read back, compared, hashed in {checking:.2f} s, peak +{check_peak / GIB:.2f} GiB"
        )
        assert max(peak, check_peak) <= GIB
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert max(ratios) <= 1.3


def test_a_checkpoint_takes_one_copy_of_the_model(live: Models, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training state, Diffusers folder and single file, from the copy that lets the training go on."""
    run = RunDir(room / "run-20260101-000000")
    options = SaveOptions(save_ckpt_dir=str(room / "files"))
    run.ckpts.mkdir(parents=True)
    archive = Archive(run, "full", 1, describe(live), options, {"resolution": 512}, {})
    saves = archive.saves(Progress(update=1, epoch=0, update_in_epoch=1, images=1))
    state = {"networks": tensors_of(live), "answers": {}}
    results = []

    def work() -> None:
        with CheckpointWriter(run.ckpts) as writer:
            writer.save(state, saves)
            results.extend(writer.close())

    peak = peak_of(work)
    (result,) = results
    assert result.error is None
    assert result.folder is not None
    written = sum(path.stat().st_size for path in room.rglob("*") if path.is_file()) / 1e9
    size = model_bytes(live)
    with capsys.disabled():
        print(
            f"\na whole checkpoint: training waits {result.wait_seconds:.2f} s, {written:.2f} GB written, synced, read "
            f"back and compared in {result.write_seconds:.2f} s; peak +{peak / GIB:.2f} GiB, the model {size / GIB:.2f}"
        )
    assert peak <= size + GIB
    assert load_models(result.folder).kind == "sd1"
