"""A number that is not finite, wherever it comes up, changes no weight and no moment, and reaches no average."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training.loop
import training.step
from tests.jobs import World, run_job, watch
from training.session import Session
from utils.optimizer_names import FINDS_ITS_RATE, PARAMETERS
from utils.tree import same_tree

# One that can be told on the device to leave a step out, and one that the host asks before; the others on request.
QUICK = ("adamw", "prodigy")
OPTIMIZERS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS if "8bit" not in name
]
NAN, INF = math.nan, math.inf
Undo = Callable[[], None]


def put(tensor: Tensor, value: float, *, whole: bool = False) -> Tensor:
    """A copy of `tensor` with `value` everywhere or in one place, somewhere in the middle."""
    changed = tensor.clone(memory_format=torch.contiguous_format)
    if whole:
        changed.fill_(value)
    else:
        changed.view(-1)[changed.numel() // 2] = value
    return changed


def replaced(module: Any, name: str, function: Callable[..., Any]) -> Undo:
    """Put `function` in the place of one of `module` until what is returned is called."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, name, function)
    return patch.undo


def losses_of(value: float, *, whole: bool) -> Callable[[Session], Undo]:
    """Losses that are not finite, in the last micro-batch only."""

    def begin(_session: Session) -> Undo:
        original, calls = training.step.diffusion_step, [0]

        def poisoned(*arguments: Any) -> Tensor:
            calls[0] += 1
            losses = original(*arguments)
            return losses + put(torch.zeros_like(losses), value, whole=whole) if calls[0] == 2 else losses

        return replaced(training.step, "diffusion_step", poisoned)

    return begin


def draw_of(name: str, value: float) -> Callable[[Session], Undo]:
    """One number of a draw, `noise` or `latent_noise`."""

    def begin(_session: Session) -> Undo:
        original = training.loop.forward_backward

        def poisoned(session: Session, batch: Any, images: int, *, last: bool) -> Any:
            if last:
                setattr(batch.draws, name, put(getattr(batch.draws, name), value))
            return original(session, batch, images, last=last)

        return replaced(training.loop, "forward_backward", poisoned)

    return begin


def output_of(part: Callable[[Session], nn.Module], value: float) -> Callable[[Session], Undo]:
    """One number of what a module gives."""

    def begin(session: Session) -> Undo:
        return part(session).register_forward_hook(lambda _m, _i, output: put(output, value)).remove

    return begin


def gradient_of(part: str, place: int, value: float, *, whole: bool = False) -> Callable[[Session], Undo]:
    """The gradient of a weight, by its place among those of the network `part`."""

    def begin(session: Session) -> Undo:
        weight = list(session.parts[next(p for p in session.parts if part in p)].parameters.values())[place]
        return weight.register_hook(lambda gradient: put(gradient, value, whole=whole)).remove  # type: ignore[no-untyped-call, no-any-return]

    return begin


PLACES: dict[str, Callable[[Session], Undo]] = {
    "all losses nan": losses_of(NAN, whole=True),
    "all losses inf": losses_of(INF, whole=True),
    "all losses -inf": losses_of(-INF, whole=True),
    "one loss nan": losses_of(NAN, whole=False),
    "one loss inf": losses_of(INF, whole=False),
    "noise nan": draw_of("noise", NAN),
    "noise inf": draw_of("noise", INF),
    "latent noise nan": draw_of("latent_noise", NAN),
    "latent inf": output_of(lambda session: session.models.vae.quant_conv, INF),
    "image encoder nan": output_of(lambda session: session.models.vae.encoder, NAN),
    "text nan": output_of(lambda session: session.models.text_encoder.embeddings, NAN),
    "first layer nan": output_of(lambda session: session.models.unet.conv_in, NAN),
    "first layer inf": output_of(lambda session: session.models.unet.conv_in, INF),
    "prediction nan": output_of(lambda session: session.models.unet.conv_out, NAN),
    "prediction inf": output_of(lambda session: session.models.unet.conv_out, INF),
    "gradient of the unet's first weight nan": gradient_of("unet", 0, NAN),
    "gradient of the unet's last weight inf": gradient_of("unet", -1, INF),
    "a whole gradient of the unet -inf": gradient_of("unet", 7, -INF, whole=True),
    "gradient of the text encoder's first weight inf": gradient_of("text", 0, INF),
    "gradient of the text encoder's last weight nan": gradient_of("text", -1, NAN),
    # Finite, but its square is not.
    "a gradient beyond its norm": gradient_of("unet", 7, 3e38, whole=True),
}


def learned(session: Session) -> Any:
    """All that learns, copied."""
    state = session.state()
    return copy.deepcopy({"networks": state["networks"], "moments": state["updater"]["parts"]})


def averages_are_finite(session: Session) -> bool:
    """They move on towards the weights, whether or not these have moved."""
    averages = session.averages()
    assert averages is not None
    return all(bool(torch.isfinite(tensor).all()) for part in averages.values() for tensor in part.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_that_is_not_finite_is_learned(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """An update with each of the places in turn, and a healthy one after each."""
    places = list(PLACES)
    before: list[Any] = []
    undo: list[Undo] = []
    wrong: list[str] = []

    def look(session: Session) -> None:
        now = learned(session)
        number, poisoned = divmod(session.progress.update - 1, 2)
        if poisoned:
            undo.pop()()
            if not same_tree(now, before[-1]):
                wrong.append(f"{places[number]}: something was learned")
            if not averages_are_finite(session):
                wrong.append(f"{places[number]}: it has reached the average")
        elif before and same_tree(now["networks"], before[-1]["networks"]):
            wrong.append(f"after {places[number - 1]}: nothing was learned")
        if not poisoned and number < len(places):
            undo.append(PLACES[places[number]](session))
        before[:] = [now]

    watch(monkeypatch, look)
    updates = 2 * len(places) + 1
    rate = {"lr": 1.0 if optimizer in FINDS_ITS_RATE else 1e-3} if "lr" in PARAMETERS[optimizer] else {}
    file = tmp_path / "optimizer.json"
    file.write_text(json.dumps({"base": {"optimizer": optimizer, **rate}}))
    options = {"max_epochs": updates, "max_steps": updates, "log_step": 1, "sample_prompts": "none", "lr": None}
    options |= {"optimizer_config": file, "clip_grad_norm": 1.0, "lr_scheduler": "constant", "ema_decay_rate": 0.9}
    assert run_job(world, tmp_path / "logs", **options) == 0
    assert wrong == []
    assert capsys.readouterr().out.count("was skipped, no weight was changed") == len(places)
    assert not undo
