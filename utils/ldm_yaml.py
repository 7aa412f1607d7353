"""The `.yaml` beside a single file, which tells web UIs the shape of the model and what it predicts."""

from __future__ import annotations

from typing import Any

from utils.model_files import ModelFiles


def ldm_yaml(files: ModelFiles) -> str:
    """The configuration of the model in the words of the original program (`ldm`), as YAML."""
    import yaml

    scheduler = files.scheduler
    params = {
        "parameterization": "v" if files.prediction_type == "v_prediction" else "eps",
        "linear_start": scheduler.get("beta_start", 0.00085),
        "linear_end": scheduler.get("beta_end", 0.012),
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": files.unet.get("sample_size", 64),
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": files.vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _unet(files)},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _vae(files)},
        "cond_stage_config": _text(files),
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return str(yaml.safe_dump({"model": {"target": target, "params": params}}, sort_keys=False))


def _unet(files: ModelFiles) -> dict[str, Any]:
    unet = files.unet
    widths = [int(width) for width in unet["block_out_channels"]]
    downs = unet["down_block_types"]
    sd2 = files.kind == "sd2"
    heads = unet.get("attention_head_dim", 8)
    first = heads[0] if isinstance(heads, list | tuple) else heads
    # Diffusers' attention_head_dim has always meant the number of heads; the original asks for one or the other.
    attention = {"num_head_channels": widths[0] // int(first)} if sd2 else {"num_heads": int(first)}
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "attention_resolutions": [2**level for level, block in enumerate(downs) if "CrossAttn" in block][::-1],
        "num_res_blocks": unet.get("layers_per_block", 2),
        "channel_mult": [width // widths[0] for width in widths],
        **attention,
        "use_spatial_transformer": True,
        **({"use_linear_in_transformer": True} if sd2 else {}),
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "legacy": False,
    }


def _vae(files: ModelFiles) -> dict[str, Any]:
    widths = [int(width) for width in files.vae["block_out_channels"]]
    return {
        "embed_dim": files.vae.get("latent_channels", 4),
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": files.vae.get("latent_channels", 4),
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": files.vae.get("layers_per_block", 2),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _text(files: ModelFiles) -> dict[str, Any]:
    if files.kind == "sd1":
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    # The last layer of OpenCLIP is never used, so "penultimate" is the last one that the file holds.
    return {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
