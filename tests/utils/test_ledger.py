"""The ledger: normalised, without a host transfer, and telling of wrong captions."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.ledger import BY_FOLDER, BY_IMAGE, Ledger, Usual


def typical_loss(timestep: int) -> float:
    return 0.8 * math.exp(-timestep / 150) + 0.005


def fill(ledger: Ledger, hard: dict[str, float], *, epochs: int = 12, images: int = 60, weight: float = 1.0) -> None:
    """Losses as a model has them: a hundred times larger at small timesteps, with noise; `hard` ones times a factor."""
    chance = random.Random(3)
    for epoch in range(epochs):
        ids = [f"{'odd' if n % 2 else 'even'}/{n:02}.jpg" for n in range(images)]
        chance.shuffle(ids)
        for start in range(0, images, 4):
            batch = ids[start : start + 4]
            timesteps = [chance.randrange(1000) for _ in batch]
            losses = [
                weight
                * typical_loss(t)
                * math.exp(chance.gauss(0, 0.1))
                * hard.get(id, 1.0)
                * (0.9**epoch if epoch < 4 else 0.65)
                for id, t in zip(batch, timesteps, strict=True)
            ]
            ledger.add(batch, torch.tensor(losses), torch.tensor(timesteps))
        ledger.collect()


HARD = {f"odd/{n:02}.jpg": 1.25 for n in (1, 13, 25, 37, 49)}


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_planted_images_come_out_on_top(weight: float) -> None:
    ledger = Ledger()
    fill(ledger, HARD, weight=weight)
    assert {id for id, _ in ledger.hardest()[:10]} >= set(HARD)


def test_without_normalising_they_would_not() -> None:
    ledger = Ledger()
    fill(ledger, HARD)
    by_mean_loss = sorted(ledger.accounts, key=lambda id: -ledger.accounts[id].loss)
    assert not set(by_mean_loss[:10]) >= set(HARD), "the planted images are meant to be hidden by their timesteps"


def test_they_do_so_in_a_short_run() -> None:
    """Two visits an image, fewer than five in each range of timesteps: the first ones must count."""
    ledger = Ledger()
    fill(ledger, dict.fromkeys(HARD, 2.0), epochs=2)
    assert {id for id, _ in ledger.hardest()[:10]} >= set(HARD)


def test_the_first_values_of_a_range_say_no_more_than_they_can() -> None:
    """Two of nearly the same value make no third one an alarm."""
    for n in range(1, 9):
        usual = Usual()
        for value in [0.001 * place for place in range(n - 1)]:
            usual.surprise(value)
        assert usual.surprise(5.0) == pytest.approx(math.sqrt(n - 1), rel=1e-3)


def test_visits_that_tell_nothing_do_not_draw_a_score_down(tmp_path: Path) -> None:
    rows = []
    for early in ([10, 110, 210, 310], []):
        ledger = Ledger()
        chance = random.Random(4)
        ledger.add(
            ["other"] * 40, torch.tensor([math.exp(chance.gauss(0, 0.1)) for _ in range(40)]), torch.full((40,), 900)
        )
        ledger.add(["a"] * len(early), torch.ones(len(early)), torch.tensor(early, dtype=torch.int64))
        ledger.add(["a"], torch.tensor([1.5]), torch.tensor([900]))
        ledger.write(tmp_path, {})
        rows.append(next(csv.DictReader((tmp_path / BY_IMAGE).open(encoding="utf-8"))))
    assert [(row["image"], row["visits"]) for row in rows] == [("a", "5"), ("a", "1")]
    assert rows[0]["score"] == rows[1]["score"]
    assert float(rows[0]["score"]) > 0.7


def test_tables(tmp_path: Path) -> None:
    ledger = Ledger()
    fill(ledger, HARD)
    ledger.add(["new\nline.jpg"], torch.tensor([0.1]), torch.tensor([500]))
    ledger.write(tmp_path, {"odd/01.jpg": 'a "cat", sitting'})
    rows = list(csv.DictReader((tmp_path / BY_IMAGE).open(encoding="utf-8")))
    assert len(rows) == 61
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    by_name = {row["image"]: row for row in rows}
    assert by_name["odd/01.jpg"]["caption"] == 'a "cat", sitting'
    assert by_name["odd/01.jpg"]["visits"] == "12"
    assert "new\\nline.jpg" in by_name
    folders = list(csv.DictReader((tmp_path / BY_FOLDER).open(encoding="utf-8")))
    assert {row["folder"]: row["images"] for row in folders} == {"odd": "30", "even": "30", ".": "1"}
    scores = {row["folder"]: float(row["score"]) for row in folders}
    assert scores["odd"] > scores["even"]


def test_dropped_captions_and_broken_losses_do_not_count() -> None:
    ledger = Ledger()
    ledger.add([None, "a", "b"], torch.tensor([9.0, float("nan"), 1.0]), torch.tensor([1, 2, 999]))
    ledger.collect()
    assert set(ledger.accounts) == {"b"}
    counts, edges = ledger.histogram()
    assert (counts[0], counts[-1], sum(counts)) == (2, 1, 3)
    assert (edges[0], edges[-1], len(edges)) == (0, 1000, len(counts) + 1)


class NoTransfers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on whatever reads a value back to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, name
        assert "_to_copy" not in name, name
        return func(*args, **(kwargs or {}))


def test_adding_reads_nothing_back() -> None:
    ledger = Ledger()
    losses, timesteps = torch.rand(4, generator=torch.Generator()).requires_grad_(), torch.arange(4)
    with NoTransfers():  # type: ignore[no-untyped-call]
        ledger.add(["a", "b", "c", "d"], losses, timesteps)
    with pytest.raises(AssertionError), NoTransfers():  # type: ignore[no-untyped-call]
        losses.sum().item()
    ledger.collect()
    assert ledger.accounts["d"].loss == pytest.approx(losses[3].item())


def test_the_state_goes_on_as_if_nothing_had_been() -> None:
    whole, first = Ledger(), Ledger()
    fill(whole, HARD, epochs=2)
    fill(first, HARD, epochs=2)
    second = Ledger()
    second.load_state(json.loads(json.dumps(first.state())))
    for ledger in (whole, second):
        fill(ledger, HARD, epochs=3)
    assert whole.state() == second.state()


def test_a_state_of_three_values_an_account_goes_on() -> None:
    """As runs saved it that did not know yet what a visit could tell."""
    ledger = Ledger()
    fill(ledger, HARD, epochs=8)
    state = json.loads(json.dumps(ledger.state()))
    state["accounts"] = {id: values[:3] for id, values in state["accounts"].items()}
    old = Ledger()
    old.load_state(state)
    assert {account.telling for account in old.accounts.values()} == {8}
    assert {id for id, _ in old.hardest()[:10]} >= set(HARD)
    assert old.state()["usual"] == state["usual"]


def test_captions_are_no_formulas(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.add(["=a/1.jpg", "b/-2.jpg"], torch.tensor([1.0, 2.0]), torch.tensor([1, 2]))
    ledger.write(tmp_path, {"=a/1.jpg": '=HYPERLINK("http://x")', "b/-2.jpg": "a cat, 3 - 1 = 2"})
    rows = {row["image"]: row["caption"] for row in csv.DictReader((tmp_path / BY_IMAGE).open(encoding="utf-8"))}
    assert rows == {"'=a/1.jpg": '\'=HYPERLINK("http://x")', "b/-2.jpg": "a cat, 3 - 1 = 2"}
    assert "'=a" in (tmp_path / BY_FOLDER).read_text(encoding="utf-8")
