"""The logger: escaped, coloured only on a terminal, and never the end of a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils import logs
from utils.logs import LOGGER, append_whole, close_logs, open_console, open_log_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _detached() -> Iterator[None]:
    yield
    close_logs()


def test_lines_before_the_run_folder_exists_reach_the_file(tmp_path: Path) -> None:
    console = io.StringIO()
    open_console(console)
    LOGGER.info("first of %d", 2)
    open_log_file(tmp_path / "run.log")
    LOGGER.warning("second")
    assert console.getvalue() == "first of 2\nwarning: second\n"
    first, second = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith("INFO    first of 2")
    assert second.endswith("WARNING second")


def test_a_caption_cannot_forge_a_line_or_steer_the_terminal(tmp_path: Path) -> None:
    console = io.StringIO()
    open_console(console)
    open_log_file(tmp_path / "run.log")
    LOGGER.info("caption %s", "a\nERROR done \x1b[2J \ud800 é 😀")
    assert console.getvalue() == "caption a\\nERROR done \\x1b[2J \\ud800 é 😀\n"
    assert len((tmp_path / "run.log").read_text(encoding="utf-8").splitlines()) == 1


def test_a_block_keeps_its_lines() -> None:
    console = io.StringIO()
    open_console(console)
    LOGGER.info("one 100%\ntwo \x07")
    assert console.getvalue() == "one 100%\ntwo \\x07\n"


def test_a_console_of_few_letters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    open_console(stream)
    LOGGER.info("é 😀")
    assert raw.getvalue() == b"\\xe9 \\U0001f600\n"


def test_a_closed_console_is_told_to_the_file_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    open_console(stream)
    open_log_file(tmp_path / "run.log")
    stream.close()
    LOGGER.info("one")
    LOGGER.info("two")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.count("cannot be written") == 1
    assert "one" in text
    assert "two" in text


def test_a_broken_pipe_leaves_the_exit_code_alone(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom utils.logs import LOGGER, open_console\nfrom utils.console import Bar\n"
        "open_console(); sys.stdin.readline()\nbar = Bar(3)\n"
        "for n in range(3): bar.advance(); bar.show(epoch=1, loss=0.5); LOGGER.info('line %d', n)\n"
        "open('done', 'w').write('yes')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


def test_lines_wait_while_the_disk_refuses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.StringIO()
    open_console(console)
    monkeypatch.setattr(logs, "_RETRY_SECONDS", 0.0)
    path = tmp_path / "gone" / "run.log"
    open_log_file(path)
    LOGGER.info("one")
    LOGGER.info("two")
    path.parent.mkdir()
    LOGGER.info("three")
    words = [line.split()[-1] for line in path.read_text(encoding="utf-8").splitlines() if "cannot" not in line]
    assert words == ["one", "two", "three"]
    assert console.getvalue().count("cannot be written") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    import pty

    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        open_console(stream)
        LOGGER.warning("careful")
        assert os.read(main, 1000).startswith(b"\x1b[33mwarning: careful")
        monkeypatch.setenv("NO_COLOR", "1")
        open_console(stream)
        LOGGER.warning("careful")
        assert os.read(main, 1000).startswith(b"warning: careful")
    os.close(main)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="space"):
        append_whole(Path("/dev/full"), b"x" * 10)
    append_whole(tmp_path / "file", b"ab")
    append_whole(tmp_path / "file", b"cd")
    assert (tmp_path / "file").read_bytes() == b"abcd"


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints would otherwise be written into it."""
    body = (
        "import os, sys\n"
        "os.close(1); os.close(2); sys.stdout = sys.stderr = None\n"
        "from utils.logs import occupy_standard_streams\n"
        "occupy_standard_streams()\n"
        f"number = os.open({str(tmp_path / 'checkpoint')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(1, b'out'); os.write(2, b'error'); os._exit(number)\n"
    )
    assert subprocess.run([sys.executable, "-c", body], cwd=ROOT, check=False).returncode > 2
    assert (tmp_path / "checkpoint").read_bytes() == b""
