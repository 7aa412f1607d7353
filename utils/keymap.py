"""Names of tensors in the two layouts: a Diffusers folder, and the original single file of Stable Diffusion 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from utils.errors import UserError, printable
from utils.model_files import COMPONENTS, ModelFiles

TEXT_PREFIX = "text_model."
UNET_HOME = "model.diffusion_model."
VAE_HOME = "first_stage_model."
SD1_TEXT_HOME = "cond_stage_model.transformer."
SD2_TEXT_HOME = "cond_stage_model.model."
HOMES = (UNET_HOME, VAE_HOME, SD1_TEXT_HOME, SD2_TEXT_HOME)


class Entry(NamedTuple):
    """One tensor of the single file.

    Args:
        name: its name there.
        part: "unet", "text_encoder" or "vae".
        sources: the Diffusers names it is made of: one, or query, key and value stacked along the first dimension.
        as_conv: the single file stores the matrix as a 1x1 convolution.
    """

    name: str
    part: str
    sources: tuple[str, ...]
    as_conv: bool = False


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Diffusers before 0.13 and its folders.
VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SD2_TEXT_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
SD2_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def disk_name(part: str, name: str) -> str:
    """The name of a tensor on disk, whatever Transformers and Diffusers of today or of old call it in memory.

    The text encoder's carry the prefix `text_model.`: without it older programs load a random encoder and say nothing.
    """
    if part == "text_encoder":
        return name if name.startswith(TEXT_PREFIX) else TEXT_PREFIX + name
    if part == "vae":
        return re.sub(
            r"(mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
            lambda found: f"{found[1]}{VAE_OLD_ATTENTION[found[2]]}.",
            name,
        )
    return name


def key_map(files: ModelFiles, names: Mapping[str, Iterable[str]]) -> list[Entry]:
    """Every tensor of the single file, given the disk names of the three parts; each name is used exactly once.

    Raises `UserError` for a name that the single file has no place for.
    """
    translate: dict[str, Callable[[str], str]] = {"unet": _unet_names(files), "vae": _vae_names(files)}
    entries = []
    for part in COMPONENTS:
        if part == "text_encoder":
            entries += _text_entries(files.kind, names[part])
            continue
        for name in names[part]:
            as_conv = part == "vae" and re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name) is not None
            entries.append(Entry(translate[part](name), part, (name,), as_conv))
    assert len({entry.name for entry in entries}) == len(entries), "two tensors got one name"
    return entries


def _unet_names(files: ModelFiles) -> Callable[[str], str]:
    layers: int = files.unet["layers_per_block"]
    ups = files.unet["up_block_types"]

    def module(name: str) -> str:
        for ours, theirs in UNET_ENDS.items():
            if name.startswith(f"{ours}."):
                return theirs + name.removeprefix(ours)
        found = re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        )
        if found is None:
            raise UserError(f"the UNet has {printable(name)}, which no Stable Diffusion 1.x or 2.x has")
        side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            slot = 2 if "CrossAttn" in ups[block] else 1
            return f"output_blocks.{block * (layers + 1) + layers}.{slot}.{rest}"
        number = block * (layers + 1) + layer + (side == "down")
        home = "input_blocks" if side == "down" else "output_blocks"
        return f"{home}.{number}.{0 if kind == 'resnets' else 1}.{rest}"

    def translate(name: str) -> str:
        new = module(name)
        return UNET_HOME + (_leaf(new, UNET_RESNET) if ".resnets." in name else new)

    return translate


def _vae_names(files: ModelFiles) -> Callable[[str], str]:
    levels = len(files.vae["block_out_channels"])

    def translate(name: str) -> str:
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        if "mid_block.attentions.0." in new:
            new = _leaf(new.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        return VAE_HOME + new

    return translate


def _leaf(name: str, table: Mapping[str, str]) -> str:
    """`name` with its last module, before `weight` or `bias`, replaced by the table."""
    stem, _, ending = name.rpartition(".")
    for ours, theirs in table.items():
        if stem.endswith(f".{ours}"):
            return f"{stem.removesuffix(ours)}{theirs}.{ending}"
    raise UserError(f"the model has {printable(name)}, which no Stable Diffusion 1.x or 2.x has")


def _text_entries(kind: str, names: Iterable[str]) -> list[Entry]:
    if kind == "sd1":
        return [Entry(SD1_TEXT_HOME + name, "text_encoder", (name,)) for name in names]
    entries = []
    for name in names:
        inner = name.removeprefix(TEXT_PREFIX)
        if inner in SD2_TEXT_ENDS:
            entries.append(Entry(SD2_TEXT_HOME + SD2_TEXT_ENDS[inner], "text_encoder", (name,)))
            continue
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", inner)
        if found is None:
            raise UserError(f"the text encoder has {printable(name)}, which no Stable Diffusion 2.x has")
        block, module, ending = f"{SD2_TEXT_HOME}transformer.resblocks.{found[1]}.", found[2], found[3]
        if module in SD2_TEXT_LAYER:
            entries.append(Entry(f"{block}{SD2_TEXT_LAYER[module]}.{ending}", "text_encoder", (name,)))
        elif module == "self_attn.q_proj":
            # OpenCLIP keeps query, key and value in one matrix.
            three = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
            entries.append(Entry(f"{block}attn.in_proj_{ending}", "text_encoder", three))
        else:
            assert module in ("self_attn.k_proj", "self_attn.v_proj"), name
    return entries
