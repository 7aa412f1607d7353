"""What every test stands on: no network, one thread, the same bits."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests remember of pictures stays out of the user's own cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="emulsion-tests-")

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One and two CPU threads give different bits: tests compare at equal counts, and share the cores among workers."""
    import torch

    torch.set_num_threads(1)
