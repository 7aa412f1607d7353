"""The bar and the lines at start and end."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.console import Bar, duration, end_summary, start_line, validation_line
from utils.logs import close_logs, open_console, open_log_file


@pytest.fixture(autouse=True)
def _detached() -> Iterator[None]:
    yield
    close_logs()


def test_plain_lines_with_the_time_left_when_nobody_watches() -> None:
    stream, now = io.StringIO(), [0.0]
    open_console(stream)
    with Bar(100, start=20, stream=stream, clock=lambda: now[0]) as bar:
        now[0] = 1000.0  # loading, the first samples, the first update
        bar.advance()
        for _ in range(10):
            now[0] += 0.9
            bar.advance()
        bar.show(epoch=2, loss=0.12345, lr=1e-6, images_per_second=12.34, memory_gib=(5.12, 23.6))
    assert stream.getvalue() == (
        "update 31/100, epoch 2, loss 0.1235, lr 1.00e-06, 12.3 images/s, 5.1 of 23.6 GiB, 1m02s left\n"
    )


@pytest.mark.parametrize(("log_step", "said"), [(1000, 1), (2, 0)])
def test_how_long_it_will_take_is_said_once_when_the_pace_is_known(log_step: int, said: int) -> None:
    """Unless an earlier line has said it."""
    stream, now = io.StringIO(), [0.0]
    open_console(stream)
    with Bar(1001, stream=stream, clock=lambda: now[0]) as bar:
        for update in range(1, 21):
            now[0] += 4.0
            bar.advance()
            if update % log_step == 0:
                bar.show(epoch=1)
    lines = [line for line in stream.getvalue().splitlines() if "to come" in line]
    assert lines == ["about 1h06m for the 997 updates to come"] * said


def test_a_resumed_run_counts_only_its_own_pace() -> None:
    now = [0.0]
    bar = Bar(1000, start=900, stream=io.StringIO(), clock=lambda: now[0])
    assert bar.seconds_left() is None
    bar.advance()
    assert bar.seconds_left() is None
    now[0] = 10.0
    bar.advance(9)
    assert bar.seconds_left() == pytest.approx(90 * 10 / 9)


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_bar_on_a_terminal_and_the_line_in_the_file(tmp_path: Path) -> None:
    import pty

    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        open_console(stream)
        open_log_file(tmp_path / "run.log")
        now = [0.0]
        with Bar(10, stream=stream, clock=lambda: now[0]) as bar:
            bar.advance(4)
            bar.show(epoch=1, loss=0.5)
            now[0] = 100.0
            bar.advance(1)
            bar.show(epoch=1, loss=0.25)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed, and all is read
        while piece := os.read(main, 100_000):
            shown += piece
    os.close(main)
    assert b"4/10" in shown
    assert b"epoch 1, loss 0.5000" in shown
    assert b"epoch 1, loss 0.2500, 8m20s left" in shown, "samples and saves count, as in the file"
    assert b"update 4/10" not in shown, "the plain line is for the file"
    assert "update 4/10, epoch 1, loss 0.5000" in (tmp_path / "run.log").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_terminal_that_goes_away_does_not_end_the_run() -> None:
    import pty

    main, side = pty.openpty()
    stream = os.fdopen(side, "w")
    bar = Bar(10, stream=stream)
    stream.close()
    os.close(main)
    for _ in range(10):
        bar.advance()
        bar.show(epoch=1)
    bar.close()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.6, "1m00s"), (750, "12m30s"), (11100, "3h05m"), (187_200, "2d04h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_validation_is_a_line_that_can_be_read() -> None:
    plain = {"loss/val": 0.0991938, "validation/val band 1 t000-249": 0.25, "loss/style": 0.5}
    assert validation_line(plain) == "validation: val 0.09919, style 0.50000"
    both = {"loss/val": 0.1, "loss/style": 0.5, "loss/val ema": 0.2, "loss/style ema": 0.4}
    assert validation_line(both) == "validation (plain / ema): val 0.10000 / 0.20000, style 0.50000 / 0.40000"


def test_start_and_end() -> None:
    def totals(seconds_left: float | None) -> str:
        return start_line(
            device="CPU",
            precision="fp32",
            parameters={"unet": 859_520_964, "text_encoder": 123_060_480},
            images=120,
            buckets=1,
            epochs=2,
            updates=60,
            seconds_left=seconds_left,
        )

    assert totals(None) == (
        "CPU, fp32; training unet 860 M, text_encoder 123 M parameters on 120 images in 1 bucket; "
        "60 updates in 2 epochs"
    )
    assert totals(3725.0) == f"{totals(None)}, about 1h02m to go"
    summary = end_summary(
        outcome="finished", updates=60, images=240, seconds=60, loss=0.25, paths={"run folder": "a\nb", "model": "m"}
    )
    assert summary.splitlines() == [
        "finished: 60 updates, 240 images in 1m00s of training, 4 images/s, loss 0.2500",
        "  run folder  a\\nb",
        "  model       m",
    ]
