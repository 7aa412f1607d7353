"""Saves under kill -9, full disks, failing calls and rotting bits; the long form is `python -m tests.faults`."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest

from utils import manifest, saving
from utils.files import remove_folder, replace_folder

if sys.platform != "linux":
    pytest.skip("kills, limits and watches Linux processes", allow_module_level=True)

from starter.make_model import random_model
from tests.faults import disk, kills, order
from tests.faults.calls import fail_every_call
from tests.faults.damage import damage, forge
from tests.faults.mutated import mutate


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="emulsion")


def test_kill_9_during_saves_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    figures = kills.kill_during_saves(tmp_path, 8, seed=1)
    assert figures.saves > 0
    assert (figures.unusable, figures.lost, figures.wrong, figures.left_behind) == (0, 0, 0, 0)


def test_the_same_kills_break_a_save_in_place(tmp_path: Path) -> None:
    """The harness can see what it claims is not there."""
    figures = kills.kill_during_naive_saves(tmp_path, 10, 1, kills.save_naively_with_torch)
    assert figures.unusable > 0


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    figures = disk.limited_files(tmp_path, 5)
    assert figures == disk.DiskFigures(full=5, kinds=figures.kinds)
    assert "NoneType" not in figures.kinds


def test_calls_that_fail_lose_nothing(tmp_path: Path) -> None:
    number = itertools.count()
    figures = fail_every_call(lambda: tmp_path / str(next(number)), step=7)
    assert figures.injected > 10
    assert (figures.old_lost, figures.half_visible, figures.next_save_failed, figures.left_behind) == (0, 0, 0, 0)


@pytest.mark.parametrize("cut", [False, True])
def test_damage_is_noticed_and_the_older_one_used(tmp_path: Path, cut: bool) -> None:
    figures = damage(tmp_path, 50, seed=1, cut=cut)
    assert figures.damaged == figures.detected == 50
    assert figures.searched == figures.older_used > 0


def test_forged_manifests_and_states_are_refused_in_words(tmp_path: Path) -> None:
    figures = forge(tmp_path, 60, seed=1)
    assert figures.crashed == 0, figures.crashes
    assert figures.refused > 20


def test_changed_model_and_option_files_are_refused_in_words_and_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "changed").mkdir()
    figures = mutate(tmp_path / "changed", random_model(tmp_path / "model"), 110, seed=1)
    assert (figures.crashed, figures.ran) == (0, 0), figures.crashes
    assert min(figures.refused, figures.taken) > 5


def test_the_trap_among_them_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changed").mkdir()
    monkeypatch.setattr("tests.faults.mutated.read_pickle", lambda path: pickle.loads(path.read_bytes()))
    monkeypatch.setattr("tests.faults.mutated._changed", lambda data, _: data)
    assert mutate(tmp_path / "changed", random_model(tmp_path / "model"), 11, seed=1).ran > 0


def test_order_on_the_disk(tmp_path: Path) -> None:
    assert order.violations(*order.watched_save(tmp_path)) == []


@pytest.mark.parametrize(
    ("where", "what", "told"),
    [
        (manifest, "sync_tree", "never synced"),
        (saving, "prove", "not read back"),
        (saving, "replace_folder", "new name is not synced"),
        (saving, "prune", "removal of older ones"),
    ],
)
def test_an_order_that_is_broken_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, what: str, told: str
) -> None:
    def rename_only(new: Path, folder: Path) -> None:
        os.replace(new, folder)  # noqa: PTH105

    def drop_first(new: Path, folder: Path) -> None:
        for old in sorted(folder.parent.glob("proj-*"))[:1]:
            remove_folder(old)
        replace_folder(new, folder)

    if what == "prune":
        monkeypatch.setattr(saving, "replace_folder", drop_first)
    else:
        broken = rename_only if what == "replace_folder" else lambda *_, **__: None
        monkeypatch.setattr(where, what, broken)
    found = order.violations(*order.watched_save(tmp_path))
    assert any(told in each for each in found), found
