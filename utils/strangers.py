"""Files given in place of a model: what they are, told by their first bytes or by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a file begins with, what it is then, and what to do.
BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`"),
    (b"<", "is a web page, not the file it should be: download the file itself"),
    (b"GGUF", "is a quantised GGUF file: take the model in fp16, bf16 or fp32"),
)
_OTHER = "only Stable Diffusion 1.x and 2.x can be trained so far"
_ALONE = "take the whole model"
_FOLDER = "name the folder above it, which holds unet/, text_encoder/, vae/, tokenizer/ and scheduler/"
# Names that no Stable Diffusion 1.x or 2.x has; the first pattern that is found decides.
FAMILIES = (
    (r"^lora_|[._]lora[._]|^lycoris_|\.hada_w|\.lokr_w", "a LoRA, a set of changes to a model: take the model itself"),
    (r"(^|\.)(absmax|quant_map|quant_state\.\w+|scaled_fp8|scale_weight)$", "quantised: take it in fp16, bf16 or fp32"),
    (r"\.time_stack\.|\.time_mixer\.|\.open_clip\.model\.visual\.", f"a video model: {_OTHER}"),
    (r"^embedder\.model\.", "an unCLIP model, which draws from pictures: take Stable Diffusion 2.1"),
    (r"^conditioner\.embedders\.1\.|diffusion_model\.label_emb\.|^add_embedding\.", f"an SDXL model: {_OTHER}"),
)
# What files hold that have no UNet of Stable Diffusion in them at all.
PARTS = (
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.", f"a Flux model, or one built like it: {_OTHER}"),
    (r"(^|\.)joint_blocks\.", f"a Stable Diffusion 3 model: {_OTHER}"),
    (r"(^|\.)(transformer_blocks\.\d+\.attn|x_embedder|t_embedder)\.", f"a diffusion transformer: {_OTHER}"),
    (r"^clip_txt_(pooled_)?mapper\.", f"a Stable Cascade model: {_OTHER}"),
    (r"^control_model\.|^controlnet_", f"a ControlNet: {_ALONE}"),
    (r"\bmotion_modules\.", f"a motion module: {_ALONE}"),
    (r"^(ip_adapter|image_proj)\.", f"an IP-Adapter: {_ALONE}"),
    (r"^(emb_params|clip_[lg])$", f"a textual inversion: {_ALONE}"),
    (r"^(down|up)_blocks\.\d+\.resnets\.", f"the UNet of a Diffusers folder: {_FOLDER}"),
    (r"^encoder\.mid_block\.", f"the VAE of a Diffusers folder: {_FOLDER}"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", f"a text encoder alone: {_ALONE}, or {_FOLDER}"),
    (r"^input_blocks\.0\.0\.", f"a UNet alone: {_ALONE}"),
    (r"^model_ema\.", "averaged weights alone, without the plain ones that name them: take the file that holds both"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.", f"a VAE alone: {_ALONE}"),
)


def stranger_by_beginning(head: bytes) -> str | None:
    """What is said of a file that begins with `head` and is no model, from the verb on; `None` of all others."""
    return next((what for start, what in BEGINNINGS if head.lstrip().startswith(start)), None)


def stranger_by_names(names: Iterable[str], *, has_unet: bool) -> str | None:
    """What the model with tensors of these `names` is, and what to do, if it is no Stable Diffusion 1.x or 2.x.

    Args:
        names: of all its tensors.
        has_unet: whether it holds the first layer of a Stable Diffusion's UNet.
    """
    listed = "\n".join(names)
    tables = FAMILIES if has_unet else FAMILIES + PARTS
    return next((what for pattern, what in tables if re.search(pattern, listed, re.MULTILINE)), None)
