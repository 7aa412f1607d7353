"""Configurations of Stable Diffusion 1.x and 2.x, for single files, which bring none of their own."""

from __future__ import annotations

import json
from typing import Any

from utils.model_files import ModelFiles

# Both kinds use OpenAI's vocabulary of 49,408 pieces; it is too large to live here.
TOKENIZER_REPOSITORY = "openai/clip-vit-large-patch14"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"

_ATTENTION_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_ATTENTION_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def preset(kind: str, prediction_type: str) -> ModelFiles:
    """The configurations of the model family `kind` ("sd1", "sd2"), without tokenizer files."""
    sd2 = kind == "sd2"
    return ModelFiles(
        unet=_unet(sd2, prediction_type),
        text_encoder=_text_encoder(sd2),
        vae=_vae(768 if sd2 and prediction_type == "v_prediction" else 512),
        scheduler=_scheduler(sd2, prediction_type),
        tokenizer={},
    )


def _unet(sd2: bool, prediction_type: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": _ATTENTION_DOWN,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": _ATTENTION_UP,
    }
    if sd2:
        config |= {
            "_diffusers_version": "0.10.0.dev0",
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96 if prediction_type == "v_prediction" else 64,
            "use_linear_projection": True,
        }
    return config


def _vae(sample_size: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _text_encoder(sd2: bool) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        # 2 is wrong and on every disk: Transformers takes it for "the largest number is the end of the text".
        "eos_token_id": 2,
        "hidden_act": "gelu" if sd2 else "quick_gelu",
        "hidden_size": 1024 if sd2 else 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4096 if sd2 else 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 16 if sd2 else 12,
        # OpenCLIP has 24; the last one is never used.
        "num_hidden_layers": 23 if sd2 else 12,
        "pad_token_id": 1,
        "projection_dim": 512 if sd2 else 768,
        "torch_dtype": "float32",
        "vocab_size": 49408,
    }


def _scheduler(sd2: bool, prediction_type: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    if sd2 and prediction_type == "v_prediction":
        config |= {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0"}
    return config


def tokenizer_settings(kind: str) -> dict[str, bytes]:
    """The small tokenizer files of the family `kind`; vocab.json and merges.txt are not among them."""
    # OpenCLIP was trained with zeros after the end of the text, and number zero is "!".
    pad = "!" if kind == "sd2" else CLIP_END
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": pad, "unk_token": CLIP_END}
    settings = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "special_tokens_map.json": json.dumps(special, indent=2).encode("ascii"),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode("ascii"),
    }
