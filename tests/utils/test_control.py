"""The control file is obeyed once, and never in the way."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from utils.control import ControlFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


def test_words_are_obeyed_once_and_the_file_goes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    control = ControlFile(path)
    assert control.poll() == []
    path.write_text("save\nSample  validate pause resume stop")
    assert control.poll() == ["save", "sample", "validate", "pause", "resume", "stop"]
    assert not path.exists()
    assert control.poll() == []
    assert "control file: validate" in caplog.text


def test_unknown_words_are_said_and_the_others_obeyed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"quit \xff\x1b[31m save")
    assert ControlFile(path).poll() == ["save"]
    assert "'quit' is none of" in caplog.text
    assert "\x1b" not in caplog.text


def test_an_empty_file_is_given_time_to_be_written(path: Path) -> None:
    control = ControlFile(path)
    with path.open("w") as file:
        assert control.poll() == []
        file.write("stop")
    assert control.poll() == ["stop"]
    path.write_text("")
    os.utime(path, (time.time() - 60,) * 2)
    assert control.poll() == []
    assert not path.exists()


@pytest.mark.skipif(os.name == "nt", reason="FIFOs and links")
def test_only_a_regular_file_is_opened(path: Path, tmp_path: Path) -> None:
    control = ControlFile(path)
    os.mkfifo(path)
    assert control.poll() == []
    path.unlink()
    (tmp_path / "real").write_text("stop")
    path.symlink_to(tmp_path / "real")
    assert control.poll() == []
    path.unlink()
    path.mkdir()
    assert control.poll() == []


def test_a_file_that_cannot_be_removed_is_not_obeyed_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError("read-only")

    path.write_text("save")
    control = ControlFile(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert control.poll() == []
        assert control.poll() == []
    assert len(caplog.records) == 1
    path.write_text("save sample")
    assert control.poll() == ["save", "sample"]


def test_a_poll_without_a_file_is_cheap(path: Path) -> None:
    control = ControlFile(path)
    started = time.perf_counter()
    for _ in range(1000):
        control.poll()
    assert time.perf_counter() - started < 0.2
