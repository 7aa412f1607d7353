"""Names of tensors at full size, without weights: ours against what diffusers' own single-file loader maps back."""

from __future__ import annotations

from typing import Any

import pytest

from utils.export import disk_weights, single_file_pieces
from utils.keymap import SD1_TEXT_HOME, SD2_TEXT_HOME, UNET_HOME, VAE_HOME, disk_name, key_map
from utils.model_files import ModelFiles
from utils.models import disk_names, empty_networks
from utils.presets import preset
from utils.single_file import SingleFile, split

COUNTS = {"sd1": (686, 248, 196, SD1_TEXT_HOME), "sd2": (686, 248, 280, SD2_TEXT_HOME)}


def full_size(kind: str) -> tuple[ModelFiles, dict[str, Any], dict[str, Any]]:
    files = preset(kind, "epsilon")
    networks = empty_networks(files)
    weights = disk_weights({part: network.state_dict() for part, network in networks.items()})
    single = {piece.name: piece.make() for piece in single_file_pieces(weights, files)}
    return files, networks, single


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_full_size_single_file_has_the_keys_of_the_original(kind: str) -> None:
    _, _, single = full_size(kind)
    unet, vae, text, text_home = COUNTS[kind]
    assert sum(name.startswith(UNET_HOME) for name in single) == unet
    assert sum(name.startswith(VAE_HOME) for name in single) == vae
    assert sum(name.startswith(text_home) for name in single) == text
    assert len(single) == unet + vae + text
    if kind == "sd1":
        assert len(single) == 1130


# Names and shapes as they are in the published files; diffusers' loader would take some of them in other spellings.
PUBLISHED = {
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.bias": (1280,),
    "model.diffusion_model.middle_block.1.norm.weight": (1280,),
    "model.diffusion_model.middle_block.2.out_layers.3.bias": (1280,),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.2.conv.bias": (640,),
    "model.diffusion_model.output_blocks.11.1.proj_out.bias": (320,),
    "model.diffusion_model.out.0.weight": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.mid.attn_1.proj_out.bias": (512,),
    "first_stage_model.encoder.norm_out.bias": (512,),
    "first_stage_model.decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
    "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
}
PUBLISHED_TEXT = {
    "sd1": {
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    "sd2": {
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.0.ln_2.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.bias": (1024,),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    },
}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_names_are_those_of_the_published_files(kind: str) -> None:
    _, _, single = full_size(kind)
    expected = PUBLISHED | PUBLISHED_TEXT[kind]
    assert {name: tuple(single[name].shape) if name in single else None for name in expected} == expected


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_maps_every_key_back_to_the_tensor_it_came_from(kind: str) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    files, networks, single = full_size(kind)
    unet = convert_ldm_unet_checkpoint(dict(single), files.unet)
    vae = convert_ldm_vae_checkpoint(dict(single), files.vae)
    if kind == "sd1":
        text = convert_ldm_clip_checkpoint(dict(single))
    else:
        text = convert_open_clip_checkpoint(networks["text_encoder"], dict(single))
    for part, found in {"unet": unet, "vae": vae, "text_encoder": text}.items():
        expected = {disk_name(part, name): tensor for name, tensor in networks[part].state_dict().items()}
        assert found.keys() == expected.keys()
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    # Many layers share a shape; on the way through the UNet a tensor stays the same object, so a swap would show.
    ours = {
        entry.sources[0]: single[entry.name] for entry in key_map(files, disk_names(networks)) if entry.part == "unet"
    }
    assert all(unet[name] is ours[name] for name in ours)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_our_own_way_back_covers_everything(kind: str) -> None:
    from pathlib import Path

    files, networks, single = full_size(kind)
    parts = split(SingleFile(Path("full"), single, files, ""), disk_names(networks))
    for part, network in networks.items():
        expected = {disk_name(part, name): tensor.shape for name, tensor in network.state_dict().items()}
        assert {name: tensor.shape for name, tensor in parts[part].items()} == expected


def test_text_prefix_and_old_vae_attention_are_written_one_way() -> None:
    assert disk_name("text_encoder", "encoder.layers.0.mlp.fc1.weight") == "text_model.encoder.layers.0.mlp.fc1.weight"
    assert disk_name("text_encoder", "text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    old = "encoder.mid_block.attentions.0.{}.weight"
    pairs = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    assert {disk_name("vae", old.format(name)) for name in pairs} == {old.format(name) for name in pairs.values()}
    assert disk_name("unet", "conv_in.weight") == "conv_in.weight"
