"""Two thousand random caption files: settings within their bounds, or an error that names the file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.captions import render
from data.item import Caption
from data.nodes import parse_json, parse_yaml
from data.settings import NOTHING, Notes, Settings, caption_settings, make_item, merge, read_settings
from data.text import BrokenFileError, decode_text

FILE = "folder/picture.yaml"
KEYS = st.sampled_from([*Settings.__dataclass_fields__, "caption", "tag", "weight", "multipli", "<<", "~", "", "on"])
ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(["1e-6", "0.5", "a, b"])
)
TREES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)
CHANGES = st.lists(st.tuples(st.integers(0, 200), st.sampled_from("[]{}:,-&*!|>'\"\t\n#%@ é\0")), max_size=3)


def as_text(tree: object, dump: Callable[[object], str], changes: list[tuple[int, str]]) -> bytes:
    text = dump(tree)
    for place, character in changes:
        text = text[:place] + character + text[place + 1 :]
    return text.encode("utf-8", "surrogatepass")


def dumped_yaml(tree: object) -> str:
    return str(yaml.dump(tree, allow_unicode=True, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))


WELL_MEANT = st.dictionaries(KEYS, TREES, max_size=4)
FILES = st.one_of(
    st.builds(as_text, WELL_MEANT, st.just(dumped_yaml), CHANGES).map(lambda raw: ("yaml", raw)),
    st.builds(as_text, WELL_MEANT, st.just(json.dumps), CHANGES).map(lambda raw: ("json", raw)),
    st.tuples(st.sampled_from(["yaml", "json", "txt"]), st.binary(max_size=60)),
    st.tuples(st.sampled_from(["yaml", "json", "txt"]), st.text(max_size=60).map(lambda t: t.encode("utf-8"))),
)


def read(kind: str, raw: bytes, notes: Notes) -> Settings:
    text, _ = decode_text(raw)
    if kind == "txt":
        return caption_settings(text)
    tree = parse_yaml(text, FILE) if kind == "yaml" else parse_json(text, FILE)
    return NOTHING if tree is None else read_settings(tree, FILE, notes)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(("yaml", b"[" * 50_000))
@example(("json", b"[" * 50_000))
@example(("yaml", b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]"))
@example(("json", rb'{"main_prompt": "\ud800", "tags": ["\udfff"]}'))
@example(("yaml", b"? [a]\n: b"))
@example(("yaml", b"caption: {caption: {caption: x}}"))
@example(("yaml", b"multiply: 1e400"))
@given(FILES)
def test_settings_or_an_error_with_its_file(case: tuple[str, bytes]) -> None:
    kind, raw = case
    notes = Notes()
    try:
        found = read(kind, raw, notes)
    except BrokenFileError as error:
        found = NOTHING
        notes.broken(error)
    assert all(problem.where.startswith(FILE) and problem.remedy for problem in notes.problems)
    assert all(note.where.startswith(FILE) for note in notes.warnings)
    assert "\n" not in "".join(str(part) for part in (*notes.problems, *notes.warnings))
    item = make_item("x", "x", 1, 1, merge(NOTHING, found), Caption("x"))
    assert 0 <= item.multiply <= 10_000
    assert 0 <= item.rating < math.inf
    assert math.isfinite(item.loss_scale)
    for share in (item.cond_dropout, item.flip_p):
        assert share is None or 0 <= share <= 1
    text = render(item.caption, random.Random(1), shuffle_tags=True, keep_tags=1)
    assert "\n" not in text
    text.encode("utf-8")
