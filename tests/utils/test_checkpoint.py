"""Saves, retention, the search for the newest good checkpoint, and saving beside the training."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import save_jobs as jobs
from utils.checkpoint import (
    STATE,
    Progress,
    Record,
    checkpoint_name,
    is_checkpoint,
    list_checkpoints,
    load_training_state,
    prove,
    read_checkpoint,
)
from utils.errors import TryLaterError
from utils.findlast import find_last
from utils.manifest import DamagedError, write_manifest
from utils.run_dir import RunDir, create_run_dir
from utils.saving import Retention, save_checkpoint
from utils.tree import same_tree
from utils.writer import CheckpointWriter, Save, available_bytes


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create_run_dir(tmp_path / "logs", jobs.PROJECT)


def save(run: RunDir, update: int, retention: Retention | None = None, **more: Any) -> Path:
    state, (job,) = jobs.save(update, **more)
    result = CheckpointWriter(run.ckpts, retention).save_now(state, [job])[0]
    assert result.error is None
    assert result.folder is not None
    return result.folder


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.ckpts.iterdir())


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_names() -> None:
    assert checkpoint_name("my proj", Progress(7, 1, 2, 3)) == "my proj-ep01-gs00007"
    assert Record("p", Progress(123456, 100, 0, 0), 1, kind="interrupted", ema=True).name == (
        "interrupted-p-ep100-gs123456_ema"
    )


def test_a_save_reads_back_and_says_what_it_is(run: RunDir) -> None:
    extra = {"options": {"lr": 1e-6}}
    folder = save(run, 12, extra=extra, versions={"torch": "2"}, finished=True)
    assert is_checkpoint(folder)
    prove(folder)
    assert read_checkpoint(folder).record == jobs.record(12, extra=extra, versions={"torch": "2"}, finished=True)
    assert same_tree(load_training_state(folder), jobs.state(12))
    assert not [p for p in run.folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".ckpt")]


def test_an_export_that_differs_is_never_called_saved(run: RunDir) -> None:
    save(run, 1)
    state, _ = jobs.save(2)

    def wrong(folder: Path, tree: dict[str, Any]) -> None:
        jobs.exports(folder, {"unet": {k: v + 1 for k, v in tree["unet"].items()}})

    result = CheckpointWriter(run.ckpts).save_now(state, [Save(jobs.record(2), wrong, jobs.check)])[0]
    assert result.folder is None
    assert "differently" in str(result.error)
    assert names(run) == ["proj-ep00-gs00001"]


def test_a_disk_that_lies_is_caught_by_the_read_back(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    real = os.replace

    def lying(old: Path, new: Path) -> None:
        real(old, new)
        if Path(new).name == "proj-ep00-gs00002":
            flip(Path(new) / "unet" / "model.safetensors")

    monkeypatch.setattr(os, "replace", lying)
    state, (job,) = jobs.save(2)
    result = CheckpointWriter(run.ckpts).save_now(state, [job])[0]
    assert isinstance(result.error, DamagedError)
    assert names(run) == ["proj-ep00-gs00001"], "neither the bad one nor anything half done is left"


def test_the_same_name_again_replaces_only_after_proof(run: RunDir) -> None:
    save(run, 1, extra={"n": 1})
    state, (job,) = jobs.save(1)
    broken = Save(job.record, job.exports, lambda folder, tree: pytest.fail("refused"))
    with pytest.raises(BaseException, match="refused"):
        CheckpointWriter(run.ckpts).save_now(state, [broken])
    assert read_checkpoint(run.ckpts / "proj-ep00-gs00001").record.extra == {"n": 1}
    save(run, 1, extra={"n": 2})
    assert names(run) == ["proj-ep00-gs00001"]
    assert read_checkpoint(run.ckpts / "proj-ep00-gs00001").record.extra == {"n": 2}


def test_training_state_stays_with_the_newest_two(run: RunDir) -> None:
    for update in range(1, 5):
        save(run, update)
    assert [c.has_state for c in list_checkpoints(run.ckpts)] == [True, True, False, False]
    for checkpoint in list_checkpoints(run.ckpts):
        prove(checkpoint.folder)
    with pytest.raises(DamagedError, match="no training state"):
        load_training_state(run.ckpts / "proj-ep00-gs00001")


def test_training_state_stays_with_all_on_request(run: RunDir) -> None:
    for update in range(1, 5):
        save(run, update, Retention(every_state=True))
    assert all(c.has_state for c in list_checkpoints(run.ckpts))


@pytest.mark.parametrize(("keep", "kept"), [(None, 5), (4, 4), (2, 2), (1, 2), (0, 2)])
def test_keep_last_n_never_goes_below_two(run: RunDir, keep: int | None, kept: int) -> None:
    for update in range(1, 6):
        save(run, update, Retention(keep_last_n=keep))
    assert names(run) == [f"proj-ep00-gs{u:05}" for u in range(6 - kept, 6)]


def test_damaged_and_errored_ones_do_not_count_as_good(run: RunDir) -> None:
    for update in range(1, 4):
        save(run, update)
    (run.ckpts / "proj-ep00-gs00003" / "model_index.json").unlink()
    save(run, 4, kind="errored")
    save(run, 5, Retention(keep_last_n=2))
    assert names(run) == [
        "errored-proj-ep00-gs00004", "proj-ep00-gs00002", "proj-ep00-gs00003", "proj-ep00-gs00005",
    ]  # fmt: skip
    assert (run.ckpts / "proj-ep00-gs00002" / STATE).is_dir()
    assert not (run.ckpts / "errored-proj-ep00-gs00004" / STATE).is_dir()


def test_an_errored_save_takes_nothing_from_the_good_ones(run: RunDir) -> None:
    for update in range(1, 3):
        save(run, update)
    save(run, 3, Retention(keep_last_n=2), kind="errored")
    assert [c.has_state for c in list_checkpoints(run.ckpts)] == [True, True, True]


def test_averaged_checkpoints_are_counted_by_themselves(run: RunDir) -> None:
    writer = CheckpointWriter(run.ckpts, Retention(keep_last_n=2))
    for update in range(1, 5):
        state, (job,) = jobs.save(update)
        ema = Save(jobs.record(update, ema=True), jobs.exports, keep_state=False)
        assert [r.error for r in writer.save_now(state, [ema, job])] == [None, None]
    assert names(run) == [f"proj-ep00-gs0000{u}{end}" for u in (3, 4) for end in ("", "_ema")]
    found = find_last(run.folder.parent, jobs.PROJECT, ema=True)
    assert found is not None
    assert found.folder.name == "proj-ep00-gs00004_ema"
    assert not found.has_state


def test_too_full_a_disk_is_said_before_anything_is_written(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    free = shutil.disk_usage(run.ckpts)._replace(free=64 * 2**20 + 20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(TryLaterError, match="GiB free"):
        save_checkpoint(run.ckpts, jobs.record(2), exports=lambda f: pytest.fail("wrote"), state=jobs.state(2))
    assert names(run) == ["proj-ep00-gs00001"]


def test_a_clock_set_back_does_not_make_a_save_old(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 2)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    save(run, 3)
    found = find_last(run.folder.parent, jobs.PROJECT)
    assert found is not None
    assert found.progress.update == 3


def test_findlast_takes_the_newest_of_the_project_that_proves(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    assert find_last(logs, jobs.PROJECT) is None
    mine, other = create_run_dir(logs, jobs.PROJECT), create_run_dir(logs, "proj-2")
    for update in (1, 2, 3):
        save(mine, update)
    save_checkpoint(other.ckpts, Record("proj-2", Progress(9, 0, 9, 9), 1), exports=lambda f: None, state={"a": 1})
    save(mine, 4, kind="errored")
    flip(mine.ckpts / "proj-ep00-gs00003" / STATE / "state.safetensors")
    found = find_last(logs, jobs.PROJECT)
    assert found is not None
    assert (found.progress.update, found.run_folder, found.finished) == (2, mine.folder, False)
    assert [path.name for path, _ in found.skipped] == ["errored-proj-ep00-gs00004", "proj-ep00-gs00003"]
    assert "doubtful" in found.skipped[0][1]
    assert "state.safetensors has changed" in found.skipped[1][1]


def test_findlast_names_unreadable_manifests_and_says_so_in_the_log(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    (run.ckpts / "proj-ep00-gs00001" / "manifest.json").write_text("{")
    (run.ckpts / "notes").mkdir()
    assert find_last(run.folder.parent, jobs.PROJECT) is None
    assert "proj-ep00-gs00001" in caplog.text
    assert "manifest.json" in caplog.text


def test_findlast_passes_over_an_unfinished_run_without_its_state(run: RunDir) -> None:
    save(run, 1)
    last = save(run, 2)
    shutil.rmtree(last / STATE)
    found = find_last(run.folder.parent, jobs.PROJECT)
    assert found is not None
    assert found.progress.update == 1
    done = save(run, 3, kind="last", finished=True)
    shutil.rmtree(done / STATE)
    found = find_last(run.folder.parent, jobs.PROJECT)
    assert found is not None
    assert (found.folder, found.finished, found.has_state) == (done, True, False)


def test_findlast_undoes_a_replacement_cut_in_two(run: RunDir) -> None:
    folder = save(run, 1)
    folder.rename(folder.with_name(f".{folder.name}.replaced"))
    found = find_last(run.folder.parent, jobs.PROJECT)
    assert found is not None
    assert found.folder == folder
    assert folder.is_dir()


def test_a_renamed_checkpoint_still_proves_but_a_borrowed_state_does_not(run: RunDir) -> None:
    one, two = save(run, 1), save(run, 2)
    moved = one.rename(run.ckpts / "my favourite")
    prove(moved)
    shutil.rmtree(two / STATE)
    shutil.copytree(moved / STATE, two / STATE)
    with pytest.raises(DamagedError, match="belongs to"):
        prove(two)


@pytest.mark.parametrize(
    "change",
    [{"progress": {"update": "5"}}, {"progress": None}, {"saved_at": "late"}, {"seed": True}, {"project": 5},
     {"finished": 1}, {"format": "other"}, {"format_version": 2}, {"extra": []}, {"kind": None}],
)  # fmt: skip
def test_a_manifest_with_strange_values_is_refused_in_words(run: RunDir, change: dict[str, Any]) -> None:
    folder = save(run, 1)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.unlink()
    kept = {k: v for k, v in content.items() if k not in ("files", "checksum", "manifest_version")}
    write_manifest(folder, kept | change, skip=STATE)
    with pytest.raises(DamagedError):
        read_checkpoint(folder)
    assert find_last(run.folder.parent, jobs.PROJECT) is None


def test_training_waits_for_the_copy_only(run: RunDir) -> None:
    go = threading.Event()
    state, (job,) = jobs.save(1)

    def slow(folder: Path, tree: dict[str, Any]) -> None:
        assert go.wait(20)
        jobs.exports(folder, tree)

    with CheckpointWriter(run.ckpts) as writer:
        writer.save(state, [Save(job.record, slow, job.check)])
        assert writer.busy
        assert writer.poll() == []
        # The training goes on while the save is being written.
        for weight in state["unet"].values():
            weight.add_(1)
        go.set()
        (result,) = writer.close()
    assert result.error is None
    assert result.folder is not None
    assert result.wait_seconds < result.write_seconds
    assert same_tree(load_training_state(result.folder), jobs.state(1))


def test_a_save_is_reported_once_however_often_one_asks(run: RunDir) -> None:
    go = threading.Event()
    state, (job,) = jobs.save(2)

    def slow(folder: Path, tree: dict[str, Any]) -> None:
        assert go.wait(20)
        jobs.exports(folder, tree)

    with CheckpointWriter(run.ckpts) as writer:
        writer.save(*jobs.save(1))
        # Waits for the first save, whose result nobody has asked for when the second is begun.
        writer.save(state, [Save(job.record, slow, job.check)])
        assert [each.record.name for each in writer.poll()] == ["proj-ep00-gs00001"]
        go.set()
        assert [each.record.name for each in writer.close()] == ["proj-ep00-gs00002"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, float("inf")),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n"}, 4096.0),
        ({"proc/meminfo": "MemAvailable: 4 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 4096.0),
        (
            {
                "proc/meminfo": "MemAvailable: 4 kB\n",
                "sys/fs/cgroup/memory.max": "3000\n",
                "sys/fs/cgroup/memory.current": "2500\n",
                "sys/fs/cgroup/memory.stat": "anon 9\ninactive_file 300\n",
            },
            800.0,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100\n",
            },
            600.0,
        ),
    ],
)
def test_memory_is_what_the_machine_and_the_container_leave(
    tmp_path: Path, files: dict[str, str], expected: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == expected
    assert available_bytes() > 0


def test_a_failing_thread_is_told_and_the_next_save_works(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    state, (job,) = jobs.save(1)

    def full(folder: Path, tree: dict[str, Any]) -> None:
        jobs.exports(folder, tree)
        raise RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos")

    with CheckpointWriter(run.ckpts) as writer:
        writer.save(state, [Save(job.record, full)])
        (result,) = writer.close()
        assert result.folder is None
        assert isinstance(result.error, RuntimeError)
        assert "was not saved" in caplog.text
        assert names(run) == []
        writer.save(*jobs.save(2))
        writer.save(*jobs.save(3))
        assert [r.error for r in writer.close()] == [None, None]
    assert names(run) == ["proj-ep00-gs00002", "proj-ep00-gs00003"]


def test_other_files_that_fail_do_not_unmake_the_checkpoint(run: RunDir) -> None:
    state, (job,) = jobs.save(1)

    def also(tree: Any) -> None:
        raise OSError("no such drive")

    result = CheckpointWriter(run.ckpts).save_now(state, [Save(job.record, job.exports, also=also)])[0]
    assert result.folder is not None
    assert "no such drive" in str(result.error)
    prove(result.folder)


def test_without_memory_for_a_copy_the_save_waits(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.writer.available_bytes", lambda: 10.0)
    with CheckpointWriter(run.ckpts) as writer:
        writer.save(*jobs.save(1))
        assert not writer.busy
        (result,) = writer.poll()
    assert result.error is None
    assert result.wait_seconds >= result.write_seconds


def test_leftovers_are_swept_at_the_start(run: RunDir) -> None:
    save(run, 1)
    half = run.ckpts / ".proj-ep00-gs00002.partial"
    half.mkdir()
    (half / "big").write_bytes(bytes(1000))
    CheckpointWriter(run.ckpts)
    assert names(run) == ["proj-ep00-gs00001"]


def test_a_prune_that_fails_does_not_fail_the_save(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for update in (1, 2):
        save(run, update)
    with monkeypatch.context() as patch:

        def busy(*_: object) -> None:
            raise PermissionError("in use")

        patch.setattr(shutil, "rmtree", busy)
        save(run, 3, Retention(keep_last_n=2))
    assert is_checkpoint(run.ckpts / "proj-ep00-gs00003")
    save(run, 4, Retention(keep_last_n=2))
    assert names(run) == ["proj-ep00-gs00003", "proj-ep00-gs00004"]


def test_bfloat16_and_8bit_moments_survive(run: RunDir) -> None:
    tree = {"state": {0: {"v": torch.ones(3).bfloat16(), "state1": torch.arange(5, dtype=torch.uint8)}}}
    folder = save_checkpoint(run.ckpts, jobs.record(1), exports=lambda f: None, state=tree)
    assert same_tree(load_training_state(folder), tree)
