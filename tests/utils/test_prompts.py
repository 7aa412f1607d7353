"""Which samples are due, and what a sample file may say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from utils.errors import ProblemsError, UserError
from utils.logs import close_logs, open_console
from utils.prompts import CFGS, SampleEntry, SampleJob, SamplePlan, sample_size


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    open_console(stream)
    yield stream
    close_logs()


def plan(path: Path | None, **changes: Any) -> SamplePlan:
    settings: dict[str, Any] = {"every": 10, "resolution": 512, "step": 64, "seed": 555} | changes
    return SamplePlan(None if path is None else str(path), **settings)


def jobs(path: Path, captions: tuple[str, ...] = (), update: int = 0, **changes: Any) -> tuple[SampleJob, ...]:
    return plan(path, **changes).sheet(update, captions).jobs


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  a dog, with (parentheses:1.5)  \n".encode())
    first, second = jobs(path)
    assert first == SampleJob(0, "a cat", "", 555, 512, 512, CFGS)
    assert (second.index, second.prompt) == (1, "a dog, with (parentheses:1.5)")


@pytest.mark.parametrize("text", ["", "\n \n", None])
def test_an_empty_or_missing_file_stands_for_captions(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    assert [job.prompt for job in jobs(path, ("a", "", "b", "c", "d", "e"))] == ["a", "b", "c", "d"]
    assert [job.prompt for job in jobs(path, ("", ""))] == ["", ""], "nothing else was trained"


def test_an_unknown_key_names_the_page_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as caught:
        plan(write(tmp_path / "s.json", {"zzz": 1, "samples": [{"qqq": 1}]}))
    assert str(caught.value).count("docs/watching.md") == 2


def test_no_file_no_samples() -> None:
    assert not any(plan(None).due(update) for update in (0, 10, 20))


def test_when_samples_are_due(tmp_path: Path) -> None:
    text = plan(tmp_path / "missing.txt")
    assert [update for update in range(31) if text.due(update)] == [0, 10, 20, 30]
    assert text.due(31, finished=True)
    assert not plan(None).due(31, finished=True)
    path = write(tmp_path / "s.json", {"generate_samples_every_n_steps": 7, "generate_pretrain_samples": False})
    assert [update for update in range(31) if plan(path).due(update)] == [7, 14, 21, 28]


def test_every_key_of_a_file_counts(tmp_path: Path) -> None:
    settings = {
        "doc": "a remark",
        "documentation": {"resolution": "a remark"},
        "resolution": 768,
        "cfgs": [5, 1],
        "batch_size": 3,
        "scheduler": "dpm++_2m_k",
        "num_inference_steps": 12,
        "show_progress_bars": True,
        "seed": 9,
        "samples": [
            {"prompt": "a", "negative_prompt": "b", "seed": 4, "size": [640, 388], "cfgs": [3]},
            {"prompt": "c", "aspect_ratio": 1.5},
        ],
    }
    sheet = plan(write(tmp_path / "s.json", settings)).sheet(0, ())
    assert (sheet.batch_size, sheet.scheduler, sheet.steps, sheet.show_progress) == (3, "dpm++_2m_k", 12, True)
    assert sheet.jobs[0] == SampleJob(0, "a", "b", 4, 640, 384, (3.0,))
    assert sheet.jobs[1] == SampleJob(1, "c", "", 9, 896, 640, (5.0, 1.0))


def test_a_random_caption_comes_from_the_data_and_depends_on_the_update_only(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"samples": [{"prompt": "unused", "random_caption": True}]})
    captions = tuple(f"caption {number}" for number in range(50))
    drawn = [jobs(path, captions, update)[0].prompt for update in range(20)]
    assert drawn == [jobs(path, captions, update)[0].prompt for update in range(20)]
    assert set(drawn) <= set(captions)
    assert len(set(drawn)) > 10


def test_seed_minus_one_is_another_each_time_and_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"seed": -1, "samples": [{"prompt": "a"}, {"prompt": "b", "seed": 3}]})
    again = plan(path)
    seeds = [again.sheet(update, ()).jobs[0].seed for update in range(5)]
    assert len(set(seeds)) == 5
    assert min(seeds) >= 0
    assert again.sheet(0, ()).jobs[1].seed == 3


def test_the_file_is_read_again_and_a_broken_one_keeps_the_last_good_one(tmp_path: Path, console: io.StringIO) -> None:
    path = write(tmp_path / "s.json", {"samples": [{"prompt": "old"}]})
    samples = plan(path)
    path.write_text('{"samples": [')
    assert [samples.sheet(update, ()).jobs[0].prompt for update in (1, 2)] == ["old", "old"]
    assert console.getvalue().count("s.json: is not valid JSON") == 1
    write(path, {"samples": [{"prompt": "new"}], "num_inference_steps": 5})
    sheet = samples.sheet(3, ())
    assert (sheet.jobs[0].prompt, sheet.steps) == ("new", 5)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.json",
        {
            "shedule": 1,
            "scheduler": "ddimm",
            "cfgs": ["x"],
            "samples": [{"promt": "a"}, {"prompt": "a", "size": [1, 2], "aspect_ratio": 1}, 5],
        },
    )
    with pytest.raises(ProblemsError) as caught:
        plan(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    assert "did you mean scheduler?" in text
    assert "did you mean prompt?" in text


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        plan(tmp_path / "p.txt")


@pytest.mark.parametrize("resolution", [64, 512, 768])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 2 / 3, 1.0, 1.3, 1.78, 4.0])
def test_sizes_by_aspect_ratio(ratio: float, resolution: int) -> None:
    step = 8 if resolution == 64 else 64
    width, height = sample_size(SampleEntry(aspect_ratio=ratio), resolution, step)
    assert width % step == height % step == 0
    assert width * height <= resolution**2
    assert width * height >= 0.6 * resolution**2
    assert abs(width / height / ratio - 1) < 0.2
    turned = sample_size(SampleEntry(aspect_ratio=1 / ratio), resolution, step)
    assert turned == (height, width)


def test_weights_are_for_prompts_and_never_for_captions(tmp_path: Path) -> None:
    entries = [{"prompt": "(a:2)"}, {"prompt": "b", "random_caption": True}, {}]
    path = write(tmp_path / "s.json", {"prompt_weights": True, "samples": entries})
    assert [job.weighted for job in jobs(path, ("a (cat:2)",))] == [True, False, False]
    path = write(tmp_path / "s.json", {"samples": entries})
    assert not any(job.weighted for job in jobs(path, ("a (cat:2)",)))
