"""The pages: the tree of files is fresh, links lead somewhere, and no path or name of one machine is written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from utils.file_tree import PAGE, page

ROOMS = ("training", "data", "optimizer", "plugins", "utils", "starter")
ROOT = Path(__file__).parent.parent
SOURCES = sorted([ROOT / "train.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_tree_of_files_is_fresh() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run make docs"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in text, path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_that_the_program_names_are_there(path: Path) -> None:
    for name in re.findall(r"docs/[\w-]+\.md", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
