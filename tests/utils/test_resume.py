"""Changes between a saved run and the present one are sorted into harmless and breaking."""

from __future__ import annotations

import json

from utils.resume import compare_resume

HARMLESS = ["options.sample_*", "options.logdir", "versions.pillow"]
SAVED = {"options": {"lr": 1e-6, "sample_steps": 250, "plugins": []}, "versions": {"torch": "2.13.0", "pillow": "13"}}


def test_nothing_changed() -> None:
    assert compare_resume(SAVED, json.loads(json.dumps(SAVED)), HARMLESS) == ([], [])


def test_changes_are_sorted_and_readable() -> None:
    now = {
        "options": {"lr": 2e-6, "sample_steps": 100, "plugins": ["a"]},
        "versions": {"torch": "2.14.0", "pillow": "13.1"},
    }
    harmless, breaking = compare_resume(SAVED, now, HARMLESS)
    assert [str(c) for c in harmless] == ["options.sample_steps: 250 -> 100", 'versions.pillow: "13" -> "13.1"']
    assert [str(c) for c in breaking] == [
        "options.lr: 1e-06 -> 2e-06", 'options.plugins: [] -> ["a"]', 'versions.torch: "2.13.0" -> "2.14.0"',
    ]  # fmt: skip


def test_what_no_rule_names_breaks_also_when_it_is_new_gone_or_null() -> None:
    harmless, breaking = compare_resume({"a": None, "b": 1}, {"b": 1, "c": 2}, [])
    assert harmless == []
    assert [str(c) for c in breaking] == ["a: null -> (absent)", "c: (absent) -> 2"]


def test_types_count() -> None:
    for before, after in ((1, True), (0, None), ("1", 1), ({}, None)):
        assert len(compare_resume({"x": before}, {"x": after}, [])[1]) == 1


def test_a_tuple_is_the_list_it_becomes_in_a_manifest() -> None:
    assert compare_resume({"x": [1, 2]}, {"x": (1, 2)}, []) == ([], [])
