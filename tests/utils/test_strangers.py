"""Files given by mistake are called by their names, and what was renamed is read all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.utils.tiny_models import sd1_model
from utils.errors import UserError
from utils.keymap import key_map
from utils.models import disk_names, empty_networks, load_models
from utils.presets import preset
from utils.strangers import stranger_by_names
from utils.weight_files import read_weights

INNER = "model.diffusion_model."
# Names of tensors as they are in published files of each kind.
STRANGERS = {
    "a LoRA": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "unet.down_blocks.0.attentions.0.to_k.lora_A.weight",
        "unet.mid_block.attentions.0.processor.to_k_lora.down.weight",
        "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight",
        "lora_unet_input_blocks_1_1_proj_in.hada_w1_a",
        "lycoris_blocks_0.lokr_w1",
    ],
    "an SDXL model": ["conditioner.embedders.1.model.ln_final.weight", f"{INNER}label_emb.0.0.weight"],
    "a Stable Diffusion 3 model": [f"{INNER}joint_blocks.0.context_block.attn.qkv.weight"],
    "a Flux model": [
        "double_blocks.0.img_attn.norm.key_norm.scale",
        f"{INNER}double_blocks.0.img_mlp.0.weight",
        "single_transformer_blocks.0.attn.to_q.weight",
    ],
    "a diffusion transformer": ["transformer_blocks.0.attn.to_q.weight", f"{INNER}x_embedder.proj.weight"],
    "a Stable Cascade model": ["clip_txt_mapper.weight"],
    "a video model": [f"{INNER}input_blocks.1.1.time_stack.0.norm1.weight"],
    "an unCLIP model": ["embedder.model.visual.proj"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "a motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight"],
    "a textual inversion": ["emb_params", "clip_g"],
    "a VAE alone": ["first_stage_model.encoder.conv_in.weight", "decoder.conv_in.weight"],
    "averaged weights alone": ["model_ema.diffusion_modelinput_blocks00weight"],
    "quantised": [f"{INNER}out.2.weight.absmax", "scaled_fp8", f"{INNER}out.2.scale_weight"],
}


@pytest.mark.parametrize("what", STRANGERS)
def test_other_files_are_called_by_their_names(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name in STRANGERS[what]:
        save_file({name: torch.zeros(4, 4), "something.else": torch.zeros(1)}, path)
        with pytest.raises(UserError, match=f"x.safetensors is {what}"):
            load_models(path)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_no_tensor_of_a_true_model_looks_like_a_stranger(kind: str) -> None:
    files = preset(kind, "epsilon")
    names = [entry.name for entry in key_map(files, disk_names(empty_networks(files)))]
    ema = [f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in names if name.startswith(INNER)]
    beside = ["cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection", "alphas_cumprod"]
    assert stranger_by_names([*names, *ema, *beside, "model_ema.decay"], has_unet=True) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd1_model(tmp_path_factory.mktemp("model") / "sd1")


def test_a_part_of_a_folder_names_the_folder(folder: Path, tmp_path: Path) -> None:
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, stem in weights.items():
        with pytest.raises(UserError, match="name the folder above it, which holds unet/"):
            load_models(folder / part / f"{stem}.safetensors")
        with pytest.raises(UserError, match=f"one part of a Diffusers model; name the folder above it, {folder}"):
            load_models(folder / part)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no Diffusers model, but holds model\.safetensors; name the file"):
        load_models(tmp_path)
    with pytest.raises(UserError, match="there is no model"):
        load_models("")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(200), "a quantised GGUF file"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "bin"])
def test_what_was_downloaded_in_place_of_a_file_is_said(
    content: bytes, match: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_weights(path)


def test_torch_files_that_are_none_and_that_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is cut short"):
        read_weights(path)
    for content in (b"", b"[1, 2]", b'{"project_name": "x"}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no model"):
            read_weights(path)


def test_what_a_file_holds_decides_not_what_it_is_called(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(4.0)}
    torch.save({"state_dict": tensors}, tmp_path / "pickle.safetensors")
    save_file(tensors, tmp_path / "safe.ckpt")
    shutil.copy(tmp_path / "safe.ckpt", tmp_path / "LOUD.SAFETENSORS")
    # The length of the header is the first byte: 60 is "<", and 32 a space.
    for length in (60, 32 + 256 * ord("<")):
        header = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(length)
        data = length.to_bytes(8, "little") + header + load_file(tmp_path / "safe.ckpt")["x"].numpy().tobytes()
        (tmp_path / f"{length}.safetensors").write_bytes(data)
    for path in tmp_path.iterdir():
        assert torch.equal(read_weights(path)["x"], tensors["x"]), path.name
