"""Workers that die while a real thread moves their batches to page-locked memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import training.parts
from tests.jobs import final_state, make_world, run_job
from tests.test_lost_workers import OPTIONS, HalfSent, queues_waited_for_at_exit
from utils.tree import same_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_worker_that_dies_with_half_its_message_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "world", pictures=12)
    pictures = shutil.copytree(world.pictures, tmp_path / "pictures")
    options = {**OPTIONS, "device": "cuda", "deterministic": True}
    assert run_job(world, tmp_path / "calm", **options) == 0
    monkeypatch.setattr(training.parts, "BatchSource", HalfSent)
    capsys.readouterr()
    assert run_job(world, tmp_path / "logs", data_root=pictures, **options) == 0
    assert "workers are started anew" in capsys.readouterr().out
    assert not queues_waited_for_at_exit()
    assert same_tree(final_state(tmp_path / "logs"), final_state(tmp_path / "calm"))
