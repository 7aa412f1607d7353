"""Named streams: functions of their arguments, apart from each other."""

from __future__ import annotations

import random
import subprocess
import sys

import torch

from utils.seeding import random_seed, stream, stream_seed, tensor_stream


def test_a_stream_is_a_function_of_its_arguments() -> None:
    assert stream_seed(555, "noise", 3, "a/b.jpg", 0) == stream_seed(555, "noise", 3, "a/b.jpg", 0)
    seeds = {
        stream_seed(555, "noise", 3, "a", 0),
        stream_seed(556, "noise", 3, "a", 0),
        stream_seed(555, "visit", 3, "a", 0),
        stream_seed(555, "noise", 30, "a"),
        stream_seed(555, "noise", 3, "a0"),
        stream_seed(555, "noise", "3", "a", 0),
    }
    assert len(seeds) == 6


def test_the_values_are_pinned_for_ever() -> None:
    # A change here changes every run: checkpoints of before could no longer be resumed exactly.
    assert stream_seed(555, "plan", 0) == PINNED
    assert stream(555, "plan", 0).random() == random.Random(PINNED).random()
    ours, plain = tensor_stream(555, "plan", 0), torch.Generator().manual_seed(PINNED)
    assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=plain))


PINNED = 3321978117736208106


def test_names_that_are_no_valid_text_have_streams() -> None:
    assert stream_seed(1, "visit", "\udcff.jpg") != stream_seed(1, "visit", "\udcfe.jpg")


def test_the_hash_seed_of_python_does_not_matter() -> None:
    code = "from utils.seeding import stream_seed; print(stream_seed(1, 'visit', 'x', 2))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        ).stdout
        for h in ("0", "1")
    }
    assert outputs == {f"{stream_seed(1, 'visit', 'x', 2)}\n"}


def test_global_state_is_neither_read_nor_changed() -> None:
    before, torch_before = random.getstate(), torch.get_rng_state()
    stream(1, "a").random()
    torch.randn(3, generator=tensor_stream(1, "a"))
    random_seed()
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
