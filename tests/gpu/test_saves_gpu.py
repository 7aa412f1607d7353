"""Saves of a state that lies on the GPU: exports and files see the CPU, and the bits are those of the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.faults import save_jobs
from utils.checkpoint import load_training_state
from utils.tree import on_cpu, same_tree
from utils.writer import CheckpointWriter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("wait", [True, False])
def test_a_state_on_the_gpu_is_saved_as_it_was_when_asked(tmp_path: Path, wait: bool) -> None:
    state, saves = save_jobs.save(1, size=100_000)
    state["unet"] = {name: weight.cuda() for name, weight in state["unet"].items()}
    state["optimizer"]["state"][0]["moment"] = torch.arange(7, device="cuda", dtype=torch.uint8)
    expected = on_cpu(state)
    with CheckpointWriter(tmp_path) as writer:
        results = writer.save_now(state, saves) if wait else []
        if not wait:
            writer.save(state, saves)
            for weight in state["unet"].values():
                weight.zero_()
            results = writer.close()
    assert results[0].error is None
    assert results[0].folder is not None
    assert same_tree(load_training_state(results[0].folder), expected)
