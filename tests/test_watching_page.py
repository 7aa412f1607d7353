"""docs/watching.md names every key, scheduler and tag that there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.validation_file import ValidationFile, read_validation_file
from utils.prompts import SCHEDULERS, SOLVERS, SampleEntry, SampleFile, check_samples
from utils.schema import option_fields

PAGE = (Path(__file__).parent.parent / "docs" / "watching.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", [SampleFile, SampleEntry, ValidationFile])
def test_every_key_is_named(section: type) -> None:
    missing = [name for name in option_fields(section) if not re.search(rf"\b{name}\b", PAGE)]
    assert not missing


def test_every_scheduler_is_named() -> None:
    missing = [
        name for name in (*SCHEDULERS, *SOLVERS) if not re.search(rf"(?<!\S)\(?=?\s?{re.escape(name)}(?![\w+])", PAGE)
    ]
    assert not missing


def test_the_examples_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    samples, validation = (block for block in blocks if block.lstrip().startswith("{"))
    (tmp_path / "samples.json").write_text(samples, encoding="utf-8")
    check_samples(str(tmp_path / "samples.json"))
    assert len(json.loads(samples)["samples"]) == 4
    (tmp_path / "validation.json").write_text(validation, encoding="utf-8")
    read_validation_file(tmp_path / "validation.json")
