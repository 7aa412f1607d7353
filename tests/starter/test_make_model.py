from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from starter.make_model import random_model
from starter.networks import TINY, build_networks
from starter.tokenizer import WORLD_WORDS, write_tokenizer

LAYOUT = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random"), seed=3)


def test_the_folder_is_a_whole_pipeline(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    assert {path.name for path in folder.iterdir()} == LAYOUT
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=1, width=80, height=48, output_type="np").images
    assert picture.shape == (1, 48, 80, 3)


def test_the_text_encoder_loads_by_both_spellings(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    made = dict(build_networks(TINY, seed=3).text_encoder.state_dict())
    kept = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in kept)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "text_encoder" / "config.json").read_bytes())
    plain = {name.removeprefix("text_model."): tensor for name, tensor in kept.items()}
    save_file(plain, bare / "model.safetensors", metadata={"format": "pt"})
    for where in (folder / "text_encoder", bare):
        loaded = dict(CLIPTextModel.from_pretrained(where).state_dict())
        assert loaded.keys() == made.keys()
        assert all(torch.equal(loaded[name], made[name]) for name in made)


def test_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (build_networks(TINY, seed=seed).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_prediction_type_is_in_the_scheduler(tmp_path: Path) -> None:
    random_model(tmp_path, prediction_type="v_prediction")
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)


def test_the_worlds_words_are_single_tokens_and_others_fall_into_pieces(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    count = write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == count < 1000
    assert tokenizer.model_max_length == 77
    for word in WORLD_WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    pieces = tokenizer("a ZORP, Zürich 🙂").input_ids
    assert tokenizer.decode(pieces, skip_special_tokens=True) == "a zorp , zürich 🙂"
    empty = tokenizer("", padding="max_length").input_ids
    assert len(empty) == 77
    assert set(empty[1:]) == {tokenizer.eos_token_id}
