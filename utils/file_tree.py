"""The file tree of README.md, a line a file, from each file's first sentence: `python -m utils.file_tree` renews it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
START, END = "<!-- tree -->", "<!-- end of tree -->"
ROOMS = ("training", "data", "optimizer", "utils", "starter")
OTHERS = {
    "train.json": "the options, as recommended for SD 1.5 at 512",
    "optimizer.json": "optimizers, rates and freezing",
    "sample_prompts.txt": "what samples are drawn of",
    "starter/": "the embedded default: model, pictures, their options, and the scripts that made them",
    "docs/": "one question a page",
    "tests/": "mirrors the source; whole runs, faults, GPU, figures (bench)",
    "Makefile": "train, test, lint, types, gpu, faults",
}


def tree() -> str:
    """The tree as it should stand in the page."""
    rows = [("train.py", _sentence(ROOT / "train.py"))]
    for room in ROOMS:
        files = [path for path in sorted((ROOT / room).glob("*.py")) if path.name != "__init__.py"]
        rows += [(f"{room}/{path.name}", _sentence(path)) for path in files]
    rows += OTHERS.items()
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"{name:<{width}}  {sentence}" for name, sentence in rows)
    return f"{START}\n```\n{lines}\n```\n{END}"


def page(text: str) -> str:
    """The page `text` with its tree renewed."""
    before, _, rest = text.partition(START)
    return before + tree() + rest.partition(END)[2]


def _sentence(path: Path) -> str:
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert words is not None, f"{path} does not say what it holds"
    return words.split("\n")[0].rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
