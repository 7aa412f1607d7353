"""The starter's networks: real Diffusers and Transformers classes at toy sizes, and how they lie on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starter.tokenizer import END, MAX_TOKENS, START, vocabulary, write_tokenizer
from utils.seeding import stream_seed


@dataclass(frozen=True, slots=True)
class Size:
    """How wide and deep the networks are; the layout is Stable Diffusion's at every size."""

    unet: tuple[int, ...]
    unet_layers: int
    unet_heads: int
    vae: tuple[int, int, int, int]
    vae_layers: int
    text_width: int
    text_layers: int
    text_heads: int
    norm_groups: int


STARTER = Size((64, 128), 1, 4, (16, 32, 64, 64), 1, 96, 3, 4, 16)
TINY = Size((16, 32), 1, 2, (8, 8, 16, 16), 1, 32, 3, 2, 8)


@dataclass(frozen=True, slots=True)
class Networks:
    """The three networks of one model, in full precision on the CPU."""

    unet: Any
    vae: Any
    text_encoder: Any

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


def build_networks(size: Size, *, seed: int) -> Networks:
    """Untrained networks whose weights depend on `size` and `seed` alone; the global generator is left as it was."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def seeded(name: str, build: Callable[[], Any]) -> Any:
        torch.manual_seed(stream_seed(seed, "networks", name))
        return build().eval()

    with torch.random.fork_rng(devices=[]):
        return Networks(
            unet=seeded("unet", lambda: UNet2DConditionModel(**unet_config(size))),
            vae=seeded("vae", lambda: AutoencoderKL(**vae_config(size))),
            text_encoder=seeded("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**text_config(size)))),
        )


def unet_config(size: Size) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel: cross-attention everywhere but on the lowest level, as in SD 1."""
    levels = len(size.unet)
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": size.unet,
        "layers_per_block": size.unet_layers,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "cross_attention_dim": size.text_width,
        "attention_head_dim": size.unet_heads,
        "norm_num_groups": size.norm_groups,
    }


def vae_config(size: Size) -> dict[str, Any]:
    """Arguments of AutoencoderKL: four levels, so one latent for 8x8 pixels."""
    return {
        "block_out_channels": size.vae,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": size.vae_layers,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }


def text_config(size: Size) -> dict[str, Any]:
    """Arguments of CLIPTextConfig, with the numbers of our own start and end tokens."""
    tokens, _ = vocabulary()
    return {
        "vocab_size": len(tokens),
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "projection_dim": size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokens[START],
        "eos_token_id": tokens[END],
        "pad_token_id": tokens[END],
    }


def scheduler_config(prediction_type: str) -> dict[str, Any]:
    """The scheduler that ships with SD 1, for the given `prediction_type` ("epsilon" or "v_prediction")."""
    return {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "trained_betas": None,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "clip_sample": False,
    }


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_pipeline(
    folder: Path, networks: Networks, *, dtype: torch.dtype, prediction_type: str = "epsilon", scaling_factor: float
) -> None:
    """Write a complete Diffusers folder with weights in `dtype`; `scaling_factor` goes into the VAE's configuration."""
    networks.vae.register_to_config(scaling_factor=scaling_factor)
    weight_names = {"text_encoder": "model.safetensors"}
    for name, part in networks.parts().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        _save_config(folder / name, part)
        _save_weights(folder / name / weight_names.get(name, "diffusion_pytorch_model.safetensors"), part, dtype)
    _mend_text_config(folder / "text_encoder" / "config.json")
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(prediction_type))
    _write_json(folder / "model_index.json", MODEL_INDEX)


def read_weights(folder: Path, networks: Networks) -> float:
    """Load the UNet and the text encoder that `save_pipeline` wrote into `networks`; returns the scaling factor."""
    from safetensors.torch import load_file

    for name in ("unet", "text_encoder"):
        part = networks.parts()[name]
        (path,) = (folder / name).glob("*.safetensors")
        kept = load_file(path)
        part.load_state_dict({key: kept[disk_name(part, key)].float() for key in _state(part)}, strict=False)
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return float(config["scaling_factor"])


def _save_config(folder: Path, part: Any) -> None:
    if hasattr(part, "save_config"):
        part.save_config(folder)
    else:
        part.config.save_pretrained(folder)


def _save_weights(path: Path, part: nn.Module, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    tensors = {disk_name(part, name): tensor.detach().to(dtype).contiguous() for name, tensor in _state(part).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _state(part: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in part.state_dict().items() if not name.endswith("position_ids")}


def disk_name(part: nn.Module, name: str) -> str:
    """The name of a tensor on disk: CLIP's text model with the prefix that programs before transformers 5 ask for."""
    if type(part).__name__ == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _mend_text_config(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, config | {"architectures": ["CLIPTextModel"]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
