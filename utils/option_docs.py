"""The page docs/configuration.md, written from the options: `python -m utils.option_docs` renews it."""

from __future__ import annotations

from pathlib import Path

from utils.config import OBSOLETE, SECTIONS
from utils.schema import OptionField, option_fields, show

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_HEAD = """# What can be set?

Every option is a flag and a key of the options file: `--batch_size 4` and `"batch_size": 4` are the same.
The command line wins over the file, the file over the defaults; `null` in the file means "not given".
`python train.py` reads `train.json`; `--config FILE` reads another one.
An unknown name, a wrong type or a value out of bounds ends the start with exit code 2 and the list of all mistakes.

This page is written by `python -m utils.option_docs`; edit `utils/config.py` instead.
"""


def markdown() -> str:
    """The page as it should be."""
    parts = [_HEAD]
    for section in SECTIONS.values():
        title = (section.__doc__ or "").strip().rstrip(".")
        rows = [_row(field) for field in option_fields(section).values()]
        parts.append(
            f"## {title}\n\n| option | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    old = "\n".join(f"| {name} | {reason} |" for name, reason in OBSOLETE.items())
    parts.append(f"## Accepted from old files, without effect\n\n| key | why |\n|---|---|\n{old}\n")
    return "\n".join(parts)


def _row(field: OptionField) -> str:
    return f"| {field.name} | {_values(field)} | {show(field.default)} | {field.spec.help} |".replace("\\|", "|")


def _values(field: OptionField) -> str:
    spec = field.spec
    if spec.choices:
        return ", ".join(spec.choices)
    kind = {bool: "flag", int: "whole number", float: "number", str: "text", tuple: "texts"}.get(field.kind, "JSON")
    low = "" if spec.low is None else f" >= {spec.low:g}"
    high = "" if spec.high is None else f" <= {spec.high:g}"
    return f"{kind}{low}{',' if low and high else ''}{high}"


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8", newline="\n")
