"""Parts: what trains, what stays frozen, and the optimizer that is chosen."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from optimizer.build import Memory, build_part, default_optimizer, is_frozen
from optimizer.update import Updater
from starter.networks import TINY, build_networks
from tests.optimizer.parts import losses, settings, small_network, small_part
from utils.errors import UserError
from utils.optimizer_file import Freezing
from utils.optimizer_names import MOMENT_BYTES, PARAMETERS

LAYERS = TINY.text_layers


@pytest.fixture
def text_encoder() -> Any:
    return build_networks(TINY, seed=1).text_encoder


def trained(module: nn.Module, **freezing: Any) -> set[str]:
    part = build_part("text_encoder", module, settings({}), Freezing(**freezing), total_updates=5, device_type="cpu")
    kinds = set()
    for name in part.parameters:
        kinds.add(
            name.split("layers.")[1].split(".")[0]
            if "layers." in name
            else name.split(".")[-3 if "embed" in name else -2]
        )
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(part.parameters)
    assert {id(p) for o in part.optimizers for g in o.param_groups for p in g["params"]} == {
        id(p) for p in part.parameters.values()
    }
    return kinds


ALL = {"embeddings", "final_layer_norm", *map(str, range(LAYERS))}


@pytest.mark.parametrize(
    ("freezing", "expected"),
    [
        ({}, ALL),
        ({"unfreeze_last_n_layers": 1}, {str(LAYERS - 1), "final_layer_norm"}),
        ({"unfreeze_last_n_layers": 2}, {str(LAYERS - 2), str(LAYERS - 1), "final_layer_norm"}),
        ({"unfreeze_last_n_layers": 0}, {"final_layer_norm"}),
        ({"unfreeze_last_n_layers": 99}, ALL - {"embeddings"}),
        (
            {"unfreeze_last_n_layers": 1, "freeze_embeddings": False},
            {"embeddings", str(LAYERS - 1), "final_layer_norm"},
        ),
        ({"unfreeze_last_n_layers": 1, "freeze_final_layer_norm": True}, {str(LAYERS - 1)}),
        ({"freeze_embeddings": True}, ALL - {"embeddings"}),
        ({"freeze_final_layer_norm": True}, ALL - {"final_layer_norm"}),
    ],
)
def test_freezing(text_encoder: Any, freezing: dict[str, Any], expected: set[str]) -> None:
    assert trained(text_encoder, **freezing) == expected


def test_freezing_reads_names_with_and_without_the_old_prefix() -> None:
    freezing = Freezing(unfreeze_last_n_layers=1)
    for prefix in ("", "text_model."):
        assert is_frozen(f"{prefix}encoder.layers.10.mlp.fc1.weight", freezing, 12)
        assert not is_frozen(f"{prefix}encoder.layers.11.mlp.fc1.weight", freezing, 12)
        assert is_frozen(f"{prefix}embeddings.token_embedding.weight", freezing, 12)
        assert not is_frozen(f"{prefix}final_layer_norm.weight", freezing, 12)


def test_nothing_left_to_train_is_an_error(text_encoder: Any) -> None:
    with pytest.raises(UserError, match="disable_textenc_training"):
        trained(text_encoder, unfreeze_last_n_layers=0, freeze_final_layer_norm=True)


def test_frozen_weights_get_no_gradient_no_state_and_keep_their_bits(text_encoder: Any) -> None:
    before = {name: p.detach().clone() for name, p in text_encoder.named_parameters()}
    freezing = Freezing(unfreeze_last_n_layers=1)
    part = build_part(
        "text_encoder", text_encoder, settings({"lr": 1e-3}), freezing, total_updates=5, device_type="cpu"
    )
    updater = Updater([part], seed=0)
    for done in range(3):
        out = text_encoder(torch.arange(10)[None]).last_hidden_state.square().mean((1, 2))
        updater.backward(out, torch.ones(1), 1, done=done, last=True)
        assert {n for n, p in text_encoder.named_parameters() if p.grad is not None} == set(part.parameters)
        updater.step(done)
    assert len(part.optimizers[0].state) == len(part.parameters)
    for name, parameter in text_encoder.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in part.parameters), name


def live_bytes() -> int:
    """The bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def training_bytes(layers: int | None) -> tuple[int, int]:
    """What training adds to the memory of a text encoder, and the bytes of the weights that train."""
    module = build_networks(TINY, seed=1).text_encoder
    before = live_bytes()
    freezing = Freezing(unfreeze_last_n_layers=layers)
    part = build_part("text_encoder", module, settings({}), freezing, total_updates=5, device_type="cpu")
    updater = Updater([part], seed=0)
    for done in range(2):
        loss = module(torch.arange(10)[None]).last_hidden_state.square().mean((1, 2))
        updater.backward(loss, torch.ones(1), 1, done=done, last=True)
        del loss
        if done == 0:
            updater.step(done)
    return live_bytes() - before, sum(parameter.nbytes for parameter in part.parameters.values())


def test_freezing_saves_the_memory_of_gradients_and_moments() -> None:
    everything, weights = training_bytes(None)
    last_layer, fewer_weights = training_bytes(1)
    assert everything == pytest.approx(3 * weights, rel=0.02)  # a gradient and two moments
    assert last_layer == pytest.approx(3 * fewer_weights, rel=0.02)
    assert fewer_weights < 0.4 * weights


def test_the_device_chooses_only_when_nothing_is_named() -> None:
    assert default_optimizer("cuda") == "adamw8bit"
    assert default_optimizer("cpu") == "adamw"
    assert small_part({}).optimizer_name == "adamw"
    assert small_part({"optimizer": "adamw8bit"}).optimizer_name == "adamw8bit"
    on_cuda = build_part("unet", small_network(), settings({}), Freezing(), total_updates=5, device_type="cuda")
    assert on_cuda.optimizer_name == "adamw8bit"
    assert type(on_cuda.optimizers[0]).__mro__[1].__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("memory", [Memory(bf16_weights=True), Memory(step_in_backward=True)])
def test_optimizers_that_look_at_all_weights_cannot_have_them_cut_up(memory: Memory) -> None:
    for name in PARAMETERS:
        if name in ("prodigy", "scalar_dowg") or name.startswith("dadapt"):
            with pytest.raises(UserError, match=name):
                small_part({"optimizer": name}, memory=memory)
        else:
            small_part({"optimizer": name}, memory=memory)


def test_rates_follow_the_schedule_of_the_part() -> None:
    part = small_part({"lr": 4.0, "lr_scheduler": "linear", "lr_warmup_steps": 2, "lr_decay_steps": 10})
    assert [part.lr_at(done) for done in (0, 1, 2, 6, 10, 11)] == [0.0, 2.0, 4.0, 2.0, 0.0, 0.0]
    updater = Updater([part], seed=0)
    for done in range(4):
        updater.backward(losses(part, done), torch.ones(4), 4, done=done, last=True)
        assert updater.step(done).rates == {"unet": part.lr_at(done)}
        assert part.optimizers[0].param_groups[0]["lr"] == part.lr_at(done)


@pytest.mark.parametrize(("limit", "sizes"), [(100, [1, 1, 1, 1]), (5250, [2, 2]), (10_000, [4])])
def test_weights_in_bf16_step_in_groups_of_bounded_size(
    limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.build._GROUP_NUMBERS", limit)
    part = small_part({}, memory=Memory(bf16_weights=True))
    groups = [optimizer.param_groups[0]["params"] for optimizer in part.optimizers]
    assert [len(group) for group in groups] == sizes
    assert [id(p) for group in groups for p in group] == [id(p) for p in part.parameters.values()]


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("name", sorted(MOMENT_BYTES))
def test_the_moments_to_come_are_known_before_they_are_there(name: str, bf16_weights: bool) -> None:
    part = build_part(
        "unet",
        nn.Linear(256, 256, bias=False),
        settings({"optimizer": name, "lr": 1e-4}),
        Freezing(),
        total_updates=5,
        device_type="cpu",
        memory=Memory(bf16_weights=bf16_weights),
    )
    foreseen = part.coming_bytes()
    updater = Updater([part], seed=0)
    (weight,) = part.parameters.values()
    weight.grad = torch.ones_like(weight)
    updater.step(0)
    tensors = [v for state in part.optimizers[0].state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(foreseen, rel=0.05)
    assert part.coming_bytes() == 0
