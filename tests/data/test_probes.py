"""The validation pass: the same question every time, and an answer with little chance in it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from data.buckets import compute_buckets, nearest_bucket
from data.item import Item
from data.probes import MOST_PER_IMAGE, Probe, Validation, bands, probe_points
from data.sources import find_data
from data.turning import Turning
from data.validation import WatchedSet
from data.validation_file import VALIDATION
from tests.photos import make_photo_folder

BUCKETS = compute_buckets(64, 8)
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> tuple[Item, ...]:
    folder = tmp_path_factory.mktemp("photos")
    make_photo_folder(folder)
    return find_data([folder]).items


def encode(pixels: Tensor) -> Tensor:
    """Eight pixels to a latent, as a VAE does: three colours and the brightness."""
    small = torch.nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, 8)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


def losses(probe: Probe, strength: float = 1.0) -> Mapping[str, Tensor]:
    """How well the best linear guess at the noise does: nearly 1 at the first timesteps, near 0 at the last."""
    signal, sigma = ALPHAS[probe.timesteps].sqrt(), (1 - ALPHAS[probe.timesteps]).sqrt()
    rows = (-1, 1, 1, 1)
    noisy = signal.view(rows) * probe.latents + sigma.view(rows) * probe.noise
    error = (strength * sigma.view(rows) * noisy - probe.noise).square().flatten(1).mean(1)
    return {"mse": error, "configured": 2 * error}


def validation(items: tuple[Item, ...], **changes: object) -> Validation:
    settings: dict[str, object] = {"timesteps": (0, 1000), "seed": 555, "batch_size": 4} | changes
    sets = settings.pop("sets", [WatchedSet(VALIDATION, items)])
    return Validation(sets, lambda item: nearest_bucket(item.width, item.height, BUCKETS), encode, **settings)  # type: ignore[arg-type]


def test_the_same_number_again(items: tuple[Item, ...]) -> None:
    watching = validation(items)
    first = watching.run(0, losses)
    state = torch.get_rng_state()
    assert watching.run(1, losses) == first
    assert torch.equal(torch.get_rng_state(), state)
    resumed = validation(items[::-1][::-1])
    resumed.load_state(json.loads(json.dumps(watching.state())))
    assert resumed.run(2, losses) == first
    assert validation(items, seed=1).run(0, losses) != first
    assert watching.run(3, lambda probe: losses(probe, 0.9)) != first


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_batch_size_changes_rounding_at_most(items: tuple[Item, ...], batch_size: int) -> None:
    expected = validation(items).run(0, losses)
    found = validation(items, batch_size=batch_size).run(0, losses)
    assert found == pytest.approx(expected, rel=1e-6)


def test_every_call_has_the_same_number_of_images(items: tuple[Item, ...]) -> None:
    shapes = []

    def note(probe: Probe) -> Mapping[str, Tensor]:
        shapes.append((len(probe.captions), probe.latents.shape[0], probe.noise.shape[0], len(probe.timesteps)))
        return losses(probe)

    validation(items).run(0, note)
    assert set(shapes) == {(4, 4, 4, 4)}


def test_sets_bands_and_names(items: tuple[Item, ...]) -> None:
    sets = [
        WatchedSet(VALIDATION, items[:6]),
        WatchedSet("style", items[6:9]),
        WatchedSet("train-stabilized", items[9:], True),
    ]
    watching = validation(items, sets=sets, relative=True, timesteps=(200, 1000))
    first = watching.run(0, losses)
    assert {tag for tag in first if tag.startswith("loss/")} == {
        "loss/val",
        "loss/style",
        "loss/train-stabilized",
        "loss/_all_val_combined",
    }
    combined = (6 * first["loss/val"] + 3 * first["loss/style"]) / 9
    assert first["loss/_all_val_combined"] == pytest.approx(combined)
    assert first["validation/val configured"] == pytest.approx(2 * first["loss/val"])
    assert [tag for tag in first if tag.startswith("validation/val band")] == [
        f"validation/val band {n + 1} t{low:03}-{high - 1:03}" for n, (low, high) in enumerate(bands(200, 1000))
    ]
    assert first["validation/val band 1 t200-399"] > 2 * first["validation/val band 4 t800-999"]
    assert first["validation/style relative"] == 1.0
    later = watching.run(9, lambda probe: losses(probe, 0.5))
    assert later["validation/val relative"] == pytest.approx(later["loss/val"] / first["loss/val"])
    ema = watching.run(9, losses, label="ema")
    assert ema["loss/val ema"] == first["loss/val"]
    assert ema["loss/_all_val_combined ema"] == first["loss/_all_val_combined"]


def test_an_unreadable_picture_is_left_out(items: tuple[Item, ...], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    broken = Item("broken.jpg", str(tmp_path / "broken.jpg"), 64, 64, items[0].caption)
    assert validation((*items, broken)).run(0, losses) == validation(items).run(0, losses)


def test_little_chance_is_left(items: tuple[Item, ...]) -> None:
    """The proof that the grid pays: a quarter, at most, of the spread of one random timestep an image."""
    grid = [validation(items, seed=seed).run(0, losses)["loss/val"] for seed in range(12)]
    latents = [validation(items)._prepare(WatchedSet(VALIDATION, items)).latents]
    chance = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for latent in latents[0]:
            timesteps = torch.randint(0, 1000, (1,), generator=generator)
            noise = torch.randn(latent[None].shape, generator=generator)
            total += float(losses(Probe(latent[None], ("",), timesteps, noise))["mse"])
        chance.append(total / len(latents[0]))
    assert statistics.mean(grid) == pytest.approx(statistics.mean(chance), rel=0.05), "unbiased"
    assert statistics.stdev(grid) <= statistics.stdev(chance) / 4


@pytest.mark.parametrize("count", [1, 5, 32, 200])
def test_the_grid_is_even(count: int) -> None:
    ids = [f"{number}.jpg" for number in range(count)]
    points = probe_points(ids, (100, 900), 3)
    each = len(points) // count
    assert 1 <= each <= MOST_PER_IMAGE
    assert len(points) == each * count
    timesteps = sorted(point.timestep for point in points)
    assert timesteps[0] >= 100
    assert timesteps[-1] < 900
    gaps = [after - before for before, after in pairwise(timesteps)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    for place in range(count):
        parts = {(point.timestep - 100) * each // 800 for point in points if point.place == place}
        assert parts == set(range(each)), "each image is asked in every part of the range"


def hints(passes: Sequence[Sequence[float]], turning: Turning | None = None) -> list[tuple[int, str]]:
    """The passes after which something was said; the state goes through JSON each time, as in a resumed run."""
    turning, said = turning or Turning(), []
    for number, losses in enumerate(passes):
        again = Turning()
        again.load_state(json.loads(json.dumps(turning.state(), allow_nan=False)))
        turning = again
        hint = turning.observe(10 * number, losses)
        said += [] if hint is None else [(number, hint)]
    return said


def test_a_rise_is_told_once_and_again_after_a_new_low() -> None:
    base = [1.0, 2.0, 3.0, 4.0]
    ups = [1.1, 1.05, 1.0, 0.99, 1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.12, 1.14, 1.16]
    passes = [[value * up for value in base] for up in ups]
    ((number, hint),) = hints(passes)
    assert number == 10
    assert "near update 30" in hint
    lower = [[value * 0.9 for value in losses] for losses in passes]
    assert len(hints([*passes, *lower])) == 2
    assert hints([passes[0], *passes[:0:-1]]) == [], "a curve that falls"


def test_a_few_images_that_rise_much_are_told() -> None:
    """As in a run on eight pictures until it knew them by heart: one of the others doubled, some stayed."""
    base = [0.05, 0.06, 0.08, 0.2, 0.1, 0.07, 0.09, 0.05]
    share = [0.4, 0.0, 0.6, 1.0, 0.8, 0.1, 0.5, -0.1]
    passes = [[b * (1 + s * max(0, n - 5) / 20) for b, s in zip(base, share, strict=True)] for n in range(26)]
    assert len(hints(passes)) == 1


def test_weights_that_jump_about_are_no_rise() -> None:
    """Chance in the weights moves all images together, and the lowest of many passes is low by chance."""
    chance = Random(1)
    alarms = 0
    for _ in range(40):
        base = [chance.lognormvariate(0, 0.6) for _ in range(12)]
        jumps = [chance.gauss(0, 0.03) for _ in range(60)]
        alarms += bool(hints([[b * (1 + jump + chance.gauss(0, 0.03)) for b in base] for jump in jumps]))
    assert alarms <= 2
