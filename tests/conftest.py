"""What every test stands on: no network, one thread, the same bits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.jobs import World

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests remember of pictures stays out of the user's own cache, and goes when they end.
CACHE = tempfile.TemporaryDirectory(prefix="emulsion-tests-", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One and two CPU threads give different bits: tests compare at equal counts, and share the cores among workers."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured logs may hold names that are no valid text, which a worker of xdist could not send home."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and twelve photographs for whole runs, read-only; a module that needs others has its own."""
    from tests.jobs import make_world

    return make_world(tmp_path_factory.mktemp("world"), pictures=12)
