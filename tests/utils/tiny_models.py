"""Small models for the tests of models in and out: the starter's tiny SD 1, and an SD 2 of the same size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starter.make_model import random_model
from utils.export import Weights
from utils.models import Models, load_models


def sd1_model(folder: Path, *, seed: int = 0) -> Path:
    """An epsilon model with SD 1's layout."""
    return random_model(folder, seed=seed)


def sd2_model(folder: Path, *, prediction_type: str = "v_prediction") -> Path:
    """A model with SD 2's layout: linear projections, heads by level, gelu, padding by another token than the end."""
    import torch
    from diffusers import UNet2DConditionModel

    random_model(folder, prediction_type=prediction_type)
    edit_json(folder / "unet/config.json", use_linear_projection=True, attention_head_dim=[2, 4])
    edit_json(folder / "text_encoder/config.json", hidden_act="gelu")
    edit_json(folder / "tokenizer/tokenizer_config.json", pad_token="!")
    edit_json(folder / "tokenizer/special_tokens_map.json", pad_token="!")
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of the JSON object in `path`."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def tensors_of(models: Models) -> Weights:
    """The live tensors of the three networks, as a save gets them."""
    return {part: getattr(models, part).state_dict() for part in ("unet", "text_encoder", "vae")}


def load(folder: Path) -> tuple[Models, Weights]:
    """A model and its tensors."""
    models = load_models(folder)
    return models, tensors_of(models)
