"""Files and folders are there whole or not at all, with the mode the umask asks for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.files import (
    atomic_file,
    drop_replaced,
    honour_umask,
    partial_path,
    remove_folder,
    replace_folder,
    restore_all_replaced,
    sweep_leftovers,
    write_json,
    write_text,
)

posix = pytest.mark.skipif(os.name == "nt", reason="modes and fsync of folders are POSIX")


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    write_json(path, {"n": 2})
    assert path.read_text() == '{\n  "n": 2\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    partial_path(path).write_text("half")
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write() -> None:
        with atomic_file(path) as partial:
            partial.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_mode_follows_the_umask_and_not_safetensors(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(2)}, partial)
        save_file({"a": torch.zeros(2)}, folder_with(tmp_path / "sub", "x") / "b.safetensors")
        honour_umask(tmp_path / "sub")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "sub/b.safetensors", "sub/file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


def test_partial_names_tell_owners_apart_and_sweep_takes_its_own(tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    mine, other = partial_path(target, "run-1"), partial_path(target, "run-2")
    for path in (target, mine, other):
        path.write_text("x")
    assert sweep_leftovers(tmp_path, "run-1") == [mine]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([target.name, other.name])


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    kept = folder_with(tmp_path / "proj-ep00-gs00001", "x")
    hidden = folder_with(tmp_path / ".mine", "x")
    half = folder_with(partial_path(tmp_path / "proj-ep00-gs00002"), "x")
    assert sweep_leftovers(tmp_path) == [half]
    assert sorted(tmp_path.iterdir()) == sorted([kept, hidden])


def test_a_crash_between_the_two_renames_of_a_replacement_is_undone(tmp_path: Path) -> None:
    folder, new = folder_with(tmp_path / "c", "old"), folder_with(tmp_path / ".c.partial", "new")
    # The state of the disk after the first rename of replace_folder.
    folder.rename(tmp_path / ".c.replaced")
    restore_all_replaced(tmp_path)
    assert (folder / "file").read_text() == "old"
    replace_folder(new, folder)
    assert (folder / "file").read_text() == "new"
    assert (tmp_path / ".c.replaced" / "file").read_text() == "old", "kept until the new one is proven"
    drop_replaced(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_sweep_after_a_finished_replacement_keeps_the_new_one(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "c", "old")
    replace_folder(folder_with(tmp_path / ".c.partial", "new"), folder)
    sweep_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "file").read_text() == "new"


def test_a_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "c", "x")

    def die(path: Path) -> None:
        assert Path(path).name == ".c.partial"
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="counts system calls by name")
def test_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        calls.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def replace(old: Path, new: Path) -> None:
        real_replace(old, new)
        calls.append(f"rename to {Path(new).name}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "a.txt", "x")
    assert calls == ["sync .a.txt.partial", "rename to a.txt", f"sync {tmp_path.name}"]
