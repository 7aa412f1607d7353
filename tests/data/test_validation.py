"""What is held out, and when validation is due."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.checks import find_duplicates
from data.item import Caption, Item
from data.validation import arrange, hold_out
from data.validation_file import (
    COMBINED,
    STABILIZED,
    VALIDATION,
    ValidationFile,
    epoch_of,
    read_validation_file,
    validation_updates,
)
from utils.errors import ProblemsError


def item(name: str, folder: Path | None = None, **changes: Any) -> Item:
    path = str((folder or Path("nowhere")) / name)
    return Item(name, path, 64, 64, Caption(name), **changes)


def items(count: int) -> list[Item]:
    return [item(f"{number:03}.jpg") for number in range(count)]


@given(count=st.integers(2, 60), proportion=st.floats(0.01, 0.9), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition_of_the_asked_size(count: int, proportion: float, seed: int) -> None:
    everything = items(count)
    stay, held = hold_out(everything, proportion, seed)
    assert sorted(i.id for i in (*stay, *held)) == [i.id for i in everything]
    assert len(held) == min(max(1, round(count * proportion)), count - 1)
    assert (stay, held) == hold_out(everything, proportion, seed)


def test_the_seed_and_not_the_order_decides() -> None:
    _, held = hold_out(items(40), 0.25, 1)
    _, turned = hold_out(items(40)[::-1], 0.25, 1)
    assert {i.id for i in held} == {i.id for i in turned}
    _, other = hold_out(items(40), 0.25, 2)
    assert {i.id for i in held} != {i.id for i in other}


def test_one_more_image_moves_few() -> None:
    _, before = hold_out(items(100), 0.2, 1)
    _, after = hold_out([*items(100), item("new.jpg")], 0.2, 1)
    assert len({i.id for i in before} - {i.id for i in after}) <= 1


def test_duplicates_and_groups_stay_on_one_side(tmp_path: Path) -> None:
    everything = []
    for number in range(40):
        name = f"{number:03}.jpg"
        (tmp_path / name).write_bytes(b"picture %03d" % (number // 2))  # each twice
        everything.append(item(name, tmp_path, batch_id=f"group {number // 8}" if number < 16 else ""))
    for seed in range(20):
        stay, held = hold_out(everything, 0.3, seed, find_duplicates(everything))
        sides = [
            ({i.batch_id for i in part if i.batch_id}, {Path(i.path).read_bytes() for i in part})
            for part in (stay, held)
        ]
        assert not sides[0][0] & sides[1][0]
        assert not sides[0][1] & sides[1][1]
        assert 10 <= len(held) <= 12


def test_what_hangs_together_cannot_be_parted() -> None:
    one_group = [item(f"{number}.jpg", batch_id="all") for number in range(10)]
    assert hold_out(one_group, 0.2, 1) == (tuple(one_group), ())
    notes = arrange(ValidationFile(), one_group, lambda _: []).notes
    assert any("no image can be held out" in note for note in notes)


def test_a_group_larger_than_the_share_is_held_out_only_if_there_is_no_other() -> None:
    three_groups = [item(f"{number}.jpg", batch_id=f"{min(number // 4, 1)}") for number in range(10)]
    stay, held = hold_out(three_groups, 0.1, 1)
    assert (len(stay), len(held)) == (6, 4)


def test_arrangement_of_every_kind() -> None:
    folders = {"manual": [item("m.jpg")], "extra": [item("e.jpg"), item("f.jpg")], "empty": []}

    def arranged(**changes: Any) -> dict[str, int]:
        found = arrange(ValidationFile(**changes), items(20), folders.__getitem__)
        return {"training": len(found.training)} | {watched.name: len(watched.items) for watched in found.sets}

    assert arranged() == {"training": 17, VALIDATION: 3}
    assert arranged(auto_split_proportion=0.5) == {"training": 10, VALIDATION: 10}
    assert arranged(val_split_mode="none") == {"training": 20}
    assert arranged(validate_training=False) == {"training": 20}
    assert arranged(val_split_mode="manual", manual_data_root="manual") == {"training": 20, VALIDATION: 1}
    assert arranged(extra_manual_datasets={"x": "extra", "y": "empty"}) == {"training": 17, VALIDATION: 3, "x": 2}
    stable: dict[str, Any] = {
        "stabilize_training_loss": True,
        "stabilize_split_proportion": 0.5,
        "val_split_mode": "none",
    }
    assert arranged(**stable) == {"training": 20, STABILIZED: 10}
    found = arrange(ValidationFile(**stable), items(20), folders.__getitem__)
    assert found.sets[0].trained


def test_watched_images_that_are_trained_as_well_are_told(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "copy.jpg", "other.jpg"):
        (tmp_path / name).write_bytes(b"1" if name in ("a.jpg", "copy.jpg") else name.encode())
    trained = [item("a.jpg", tmp_path), item("b.jpg", tmp_path)]
    folder = [item(name, tmp_path) for name in ("b.jpg", "copy.jpg", "other.jpg")]
    manual = ValidationFile(val_split_mode="manual", manual_data_root="x")
    (note,) = arrange(manual, trained, lambda _: folder).notes
    assert "2 of 3 images of the set val are trained as well" in note
    assert arrange(manual, trained, lambda _: folder[2:]).notes == ()
    stable = ValidationFile(val_split_mode="none", stabilize_training_loss=True, stabilize_split_proportion=1)
    assert arrange(stable, trained, lambda _: folder).notes == (), "these are meant to be"


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_old_names_and_comments(tmp_path: Path) -> None:
    old = {"documentation": {"a": 1}, "val_split_proportion": 0.3, "val_data_root": "x", "val_split_mode": "manual"}
    file, warnings = read_validation_file(write(tmp_path, old))
    assert (file.auto_split_proportion, file.manual_data_root) == (0.3, "x")
    assert len(warnings) == 2


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    wrong = {"every_n_epoch": 1, "val_split_mode": "auto", "auto_split_proportion": 2, "extra_manual_datasets": ["a"]}
    with pytest.raises(ProblemsError) as caught:
        read_validation_file(write(tmp_path, wrong))
    assert len(caught.value.problems) == 4
    assert "did you mean every_n_epochs?" in str(caught.value)
    with pytest.raises(ProblemsError, match=r"(?s)docs/watching.md.*another curve"):
        read_validation_file(write(tmp_path, {"zzz": 1, "extra_manual_datasets": {"val": "folder"}}))
    with pytest.raises(ProblemsError, match="manual needs a folder"):
        read_validation_file(write(tmp_path, {"val_split_mode": "manual"}))


def test_two_sets_cannot_share_a_curve(tmp_path: Path) -> None:
    def read(*names: str, **changes: Any) -> ValidationFile:
        values = {"extra_manual_datasets": dict.fromkeys(names, "folder")} | changes
        return read_validation_file(write(tmp_path, values))[0]

    for name in (VALIDATION, COMBINED, "log_step", "epoch"):
        with pytest.raises(ProblemsError, match=f"{name}.*another curve"):
            read("style", name)
    with pytest.raises(ProblemsError, match="another curve"):
        read(STABILIZED, stabilize_training_loss=True)
    assert read("style", STABILIZED).extra_manual_datasets
    assert read(VALIDATION, val_split_mode="none").extra_manual_datasets


@pytest.mark.parametrize(
    ("epochs", "every", "due"),
    [
        ((10, 10, 10), 1, {0, 10, 20, 30}),
        ((10, 10, 10), 0.5, {0, 5, 10, 15, 20, 25, 30}),
        ((10, 12, 10), 2, {0, 22, 32}),
        ((4, 4), 10, {0, 8}),
        ((3, 3), 1.5, {0, 5, 6}),
        ((1, 1), 0.1, {0, 1, 2}),
    ],
)
def test_when_validation_is_due(epochs: tuple[int, ...], every: float, due: set[int]) -> None:
    assert validation_updates(epochs, every) == due


def test_a_run_that_is_cut_short_ends_with_validation() -> None:
    assert validation_updates((10, 10), 1, total=14) == {0, 10, 14}


def test_epoch_of_an_update() -> None:
    assert [epoch_of(update, (2, 3)) for update in range(6)] == [0, 1, 1, 2, 2, 2]
