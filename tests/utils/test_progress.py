"""Work before the training shows how far it is: a bar on a terminal, lines elsewhere, nothing when it is quick."""

from __future__ import annotations

import io
import sys
from itertools import count

import pytest

import utils.progress
from utils.logs import close_logs, open_console
from utils.progress import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_half_minute_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    open_console(stream)
    seconds = count(0.0, 10.0)
    with counted("files read", 5_000, clock=lambda: next(seconds)) as progress:
        for _ in range(5):
            progress(1_000)
    close_logs()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("of 5,000 files read")


def test_a_bar_on_a_terminal_for_slow_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with counted("files read", 10) as progress:
        progress(10)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(utils.progress, "_PATIENCE_SECONDS", 0)
    with counted("files read", 10) as progress:
        progress(10)
    assert "0/10" in terminal.getvalue()


class Closed(Terminal):
    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(utils.progress, "_PATIENCE_SECONDS", 0)
    done = 0
    with counted("files read", 10) as progress:
        for _ in range(10):
            progress(1)
            done += 1
    assert done == 10
