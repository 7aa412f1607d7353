"""Diffusers folders in: every spelling and format that is about, every fault named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.utils.tiny_models import edit_json, load, sd1_model, sd2_model, tensors_of
from utils.errors import UserError
from utils.export import write_folder
from utils.models import count_tokens, describe, encode_text, load_models, noise_scheduler, tokenize
from utils.source import Wanted

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd1_model(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def same(one: Path, other: Path) -> bool:
    a, b = tensors_of(load_models(one)), tensors_of(load_models(other))
    return all(torch.equal(tensor, b[part][name]) for part in a for name, tensor in a[part].items())


def rewrite(path: Path, **renamed: str) -> None:
    tensors = load_file(path)
    save_file({renamed.get(name, name): tensor for name, tensor in tensors.items()}, path)


def test_models_arrive_in_fp32_frozen_and_as_diffusers_reads_them(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    models = load_models(folder)
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "text_encoder", "vae"):
        ours, expected = getattr(models, part), getattr(theirs, part).state_dict()
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        assert all(
            tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in ours.state_dict().values()
        )
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    ids = tokenize(models, ["a red circle", ""])
    assert torch.equal(models.text_encoder(ids)[0], theirs.text_encoder(ids)[0])
    assert (models.kind, models.prediction_type, models.vae_factor, models.latent_channels) == ("sd1", "epsilon", 8, 4)
    assert models.latent_scale == 0.5
    assert models.context_width == models.text_encoder.config.hidden_size
    assert "Stable Diffusion 1.x, epsilon" in models.told


def test_loaded_weights_are_copies_not_views_of_the_file(folder: Path) -> None:
    expected = load_file(folder / UNET)["conv_in.weight"].clone()
    models = load_models(folder)
    with (folder / UNET).open("r+b") as file:  # in place, as a download over it would be
        file.write(bytes((folder / UNET).stat().st_size))
    assert torch.equal(models.unet.conv_in.weight, expected)


def test_text_encoder_keys_are_read_with_and_without_prefix(folder: Path, pristine: Path) -> None:
    assert all(name.startswith("text_model.") for name in load_file(folder / TEXT))
    rewrite(folder / TEXT, **{name: name.removeprefix("text_model.") for name in load_file(folder / TEXT)})
    assert not any(name.startswith("text_model.") for name in load_file(folder / TEXT))
    assert same(folder, pristine)


def test_leftovers_in_text_encoders_are_ignored(folder: Path, pristine: Path) -> None:
    leftovers = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(2, 2),
    }
    save_file({**load_file(folder / TEXT), **leftovers}, folder / TEXT)
    assert same(folder, pristine)


def test_old_vae_attention_is_read(folder: Path, pristine: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / VAE)
    for new, name in old.items():
        for key in [key for key in tensors if f"attentions.0.{new}." in key]:
            tensor = tensors.pop(key)
            as_convolution = tensor[..., None, None].contiguous() if key.endswith("weight") else tensor
            tensors[key.replace(new, name)] = as_convolution
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, folder / VAE)
    assert same(folder, pristine)


def test_variants_shards_and_old_pickles_are_read(folder: Path, pristine: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    tensors = load_file(folder / TEXT)
    torch.save(tensors, folder / "text_encoder/pytorch_model.bin")
    (folder / TEXT).unlink()
    tensors = load_file(folder / VAE)
    names = sorted(tensors)
    shards = {
        f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i * 40 : 40 if i == 0 else None]
        for i in (0, 1)
    }
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "vae" / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / f"{VAE}.index.json").write_text(json.dumps(index))
    (folder / VAE).unlink()
    assert same(folder, pristine)
    (folder / "vae" / next(iter(shards))).unlink()
    with pytest.raises(UserError, match="holds no complete weights"):
        load_models(folder)


def test_full_precision_wins_unless_a_variant_is_asked_for(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    for part, path in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT)):
        half = {key: tensor.half() for key, tensor in load_file(folder / path).items()}
        stem = (folder / path).name.removesuffix(".safetensors")
        save_file(half, folder / part / f"{stem}.fp16.safetensors")
    key = "conv_in.weight"
    assert torch.equal(load_models(folder).unet.state_dict()[key], tensors[key])
    assert torch.equal(load_models(folder, Wanted(variant="fp16")).unet.state_dict()[key], tensors[key].half().float())
    assert load_models(folder).told.endswith("epsilon (by its scheduler), fp32")
    assert load_models(folder, Wanted(variant="fp16")).told.endswith("epsilon (by its scheduler), fp16")
    with pytest.raises(UserError, match="variant int3"):
        load_models(folder, Wanted(variant="int3"))


def test_a_variant_of_one_part_is_taken_with_the_others_as_they_are(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    save_file(changed, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    models = load_models(folder, Wanted(variant="non_ema"))
    assert torch.equal(models.unet.state_dict()["conv_in.bias"], changed["conv_in.bias"])
    assert torch.equal(models.vae.state_dict()["quant_conv.bias"], load_file(folder / VAE)["quant_conv.bias"])


def test_what_a_folder_has_no_use_for_is_told(folder: Path) -> None:
    assert "change nothing here" not in load_models(folder).told
    told = load_models(folder, Wanted(ema=True, model_config=str(folder))).told
    assert told.endswith("; model_ema and model_config are for single files and change nothing here")


def test_missing_folders_and_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model .*nowhere here"):
        load_models(tmp_path / "nowhere here")
    for part in ("vae", "tokenizer", "scheduler", "text_encoder", "unet"):
        shutil.move(folder / part, tmp_path / "away")
        with pytest.raises(UserError, match=f"has no folder {part}/"):
            load_models(folder)
        shutil.move(tmp_path / "away", folder / part)
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt"):
        load_models(folder)


def test_other_families_are_refused_by_name(folder: Path) -> None:
    index = folder / "model_index.json"
    for pipeline, word in (("StableDiffusionXLPipeline", "SDXL"), ("StableDiffusionInpaintPipeline", "inpainting")):
        edit_json(index, _class_name=pipeline)
        with pytest.raises(UserError, match=word):
            load_models(folder)
    index.unlink()
    for change, word in (
        ({"in_channels": 9}, "inpainting"),
        ({"in_channels": 8}, "8 input channels"),
        ({"in_channels": 4, "addition_embed_type": "text_time"}, "SDXL"),
        ({"addition_embed_type": None, "_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    ):
        edit_json(folder / "unet/config.json", **change)
        with pytest.raises(UserError, match=word):
            load_models(folder)


def test_text_encoders_of_other_kinds_are_refused_by_name(folder: Path) -> None:
    edit_json(folder / "text_encoder/config.json", model_type="xlm-roberta")
    with pytest.raises(UserError, match="its text encoder is a xlm-roberta"):
        load_models(folder)


def test_weights_that_do_not_fit_are_named(folder: Path, pristine: Path) -> None:
    def broken(match: str, **tensors: torch.Tensor | None) -> None:
        changed = {**load_file(pristine / UNET), **tensors}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, folder / UNET)
        with pytest.raises(UserError, match=match):
            load_models(folder)

    broken(r"\d+ missing", **dict.fromkeys(load_file(pristine / UNET)))
    broken(r"1 missing \(conv_in\.weight\)", **{"conv_in.weight": None})
    broken(r"1 unexpected \(\.\./\.\./evil\)", **{"../../evil": torch.zeros(1)})
    broken(r"conv_in\.bias has shape \(3,\)", **{"conv_in.bias": torch.zeros(3)})
    for dtype in (torch.int32, torch.float8_e4m3fn):
        broken(rf"conv_in\.bias holds {dtype}", **{"conv_in.bias": torch.zeros(16).to(dtype)})
    for damage in (float("nan"), float("inf"), float("-inf")):
        weight = load_file(pristine / UNET)["conv_in.weight"]
        weight[3, 2, 1, 0] = damage
        broken(r"1 of 576 numbers in conv_in\.weight are NaN", **{"conv_in.weight": weight})
        broken(r"1 of 576 numbers in conv_in\.weight are NaN", **{"conv_in.weight": weight.half()})


def test_configurations_beyond_measure_are_refused_before_they_are_built(folder: Path) -> None:
    config = folder / "unet/config.json"
    before = config.read_text()
    for change, match in (
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
        ({"block_out_channels": [10**9, 32]}, "block_out_channels"),
        ({"down_block_types": ["DownBlock2D"] * 5000}, "5000 levels"),
        ({"cross_attention_dim": 33}, "the two come from different models"),
        ({"block_out_channels": "wide"}, "block_out_channels = wide should be a list"),
        ({"layers_per_block": [1, 1]}, "layers_per_block"),
        ({"act_fn": "none such"}, "the configuration of unet describes no network"),
        ({"time_cond_proj_dim": 8}, r"the UNet has time_embedding\.cond_proj\.weight"),
    ):
        edit_json(config, **change)
        with pytest.raises(UserError, match=match):
            load_models(folder)
        config.write_text(before)
    config.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        load_models(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "1000"},
        {"beta_schedule": "nope"},
        {"beta_start": "x"},
        {"beta_end": 3.0},
        {"beta_start": 0.9},
        {"trained_betas": [1, 2]},
        {"trained_betas": [0.0] * 1000},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"scaling_factor": "x"},
        {"scaling_factor": 0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": None},
    ],
    ids=str,
)
def test_settings_that_would_train_something_else_are_named(change: dict[str, Any], folder: Path) -> None:
    (key,) = change
    path = folder / ("vae/config.json" if key == "scaling_factor" else "scheduler/scheduler_config.json")
    edit_json(path, **change)
    with pytest.raises(UserError, match=r"_config\.json|vae/config\.json") as raised:
        load_models(folder)
    assert ("Flow" if key == "_class_name" else key) in str(raised.value)


def test_the_noise_schedules_that_are_about_are_taken(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    for schedule in ("linear", "squaredcos_cap_v2"):
        edit_json(path, beta_schedule=schedule)
        assert noise_scheduler(load_models(folder)).config["beta_schedule"] == schedule
    edit_json(path, trained_betas=[0.001] * 999 + [1.0])
    assert noise_scheduler(load_models(folder)).alphas_cumprod[-1] == 0


def test_python_files_in_a_model_folder_are_never_run(folder: Path, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    for part in ("unet", "text_encoder", "tokenizer", "vae", "."):
        for name in ("modeling.py", "__init__.py", "tokenization_clip.py", "unet.py"):
            (folder / part / name).write_text(trap)
    edit_json(folder / "text_encoder/config.json", auto_map={"AutoModel": "modeling.Evil"}, trust_remote_code=True)
    edit_json(folder / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_clip.Evil", None]})
    load_models(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm"])
def test_noise_schedules_end_where_they_should(folder: Path, name: str) -> None:
    models = load_models(folder)
    plain, zero = noise_scheduler(models, name), noise_scheduler(models, name, zero_terminal_snr=True)
    assert type(plain).__name__.lower() == f"{name}scheduler"
    assert plain.alphas_cumprod[-1] == pytest.approx(0.00466, rel=1e-3)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.alphas_cumprod[0] == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-6)
    marked = describe(models, zero_terminal_snr=True).scheduler
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(marked))
    again = load_models(folder)
    assert again.zero_terminal_snr
    assert torch.equal(noise_scheduler(again, name).alphas_cumprod, zero.alphas_cumprod)


def test_exports_are_marked_and_keep_their_scheduler_class(folder: Path) -> None:
    config = folder / "scheduler/scheduler_config.json"
    models = load_models(folder)
    assert describe(models).scheduler["_class_name"] == "PNDMScheduler"
    assert "rescale_betas_zero_snr" not in describe(models).scheduler
    spoken = load_models(folder, Wanted(prediction_type="v_prediction"))
    assert describe(spoken).scheduler["prediction_type"] == "v_prediction"
    for loaded, prediction_type, kept in (
        ("PNDMScheduler", "v_prediction", "DDIMScheduler"),
        ("PNDMScheduler", "epsilon", "EulerDiscreteScheduler"),
        ("DDIMScheduler", "v_prediction", "DDIMScheduler"),
        ("DDIMScheduler", "epsilon", "EulerDiscreteScheduler"),
        ("EulerAncestralDiscreteScheduler", "epsilon", "EulerAncestralDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", "v_prediction", "DPMSolverMultistepScheduler"),
    ):
        edit_json(config, _class_name=loaded, prediction_type=prediction_type)
        marked = describe(load_models(folder), zero_terminal_snr=True).scheduler
        assert (marked["_class_name"], marked["prediction_type"]) == (kept, prediction_type)
        assert marked["rescale_betas_zero_snr"] is True
        assert marked["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_is_marked_with_zero_terminal_snr_draws_in_plain_diffusers(folder: Path, prediction_type: str) -> None:
    from diffusers import StableDiffusionPipeline

    models = load_models(folder, Wanted(prediction_type=prediction_type))
    out = folder.parent / "out"
    write_folder(out, tensors_of(models), describe(models, zero_terminal_snr=True))
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
    assert bool(torch.isfinite(pipeline("a red circle", **arguments).images).all())
    assert pipeline.scheduler.alphas_cumprod[-1] <= 2**-24


def test_tokens_are_those_of_the_pipeline(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    models, theirs = load_models(folder), StableDiffusionPipeline.from_pretrained(folder).tokenizer
    captions = ["a red circle", "", "zebra " * 100, "Grüße, 日本語 & <|endoftext|>"]
    ids = tokenize(models, captions)
    expected = theirs(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, expected)
    assert ids.shape == (4, 77)
    counts = count_tokens(models, captions)
    assert counts[1] == 0
    assert counts[2] == len(theirs(captions[2], add_special_tokens=False).input_ids) > 75
    assert count_tokens(models, []) == []


def test_tokenizers_that_do_not_belong_are_refused(folder: Path) -> None:
    vocabulary = folder / "tokenizer/vocab.json"
    before = vocabulary.read_text(encoding="utf-8")
    words = json.loads(before)
    vocabulary.write_text(json.dumps(words | {f"more{i}": len(words) + i for i in range(9)}), encoding="utf-8")
    with pytest.raises(UserError, match="pieces of words and the text encoder knows 852"):
        load_models(folder)
    for damaged in ("{", "[]", '{"a": "b"}', "null"):
        vocabulary.write_text(damaged)
        with pytest.raises(UserError, match="tokenizer"):
            load_models(folder)
    vocabulary.write_text(before, encoding="utf-8")
    (folder / "tokenizer/merges.txt").write_bytes(b"\xff\xfe\x00 not a merge")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_models(folder)


def test_clip_skip_counts_layers_from_the_end(folder: Path) -> None:
    models = load_models(folder)
    ids = tokenize(models, ["a red circle"])
    states = models.text_encoder(ids, output_hidden_states=True)
    last = encode_text(models.text_encoder, ids, 0)
    assert torch.equal(last, states.last_hidden_state)
    assert torch.equal(encode_text(models.text_encoder, ids, 1), last)
    norm = models.text_encoder.get_submodule("final_layer_norm")
    for skip in (2, 3):
        assert torch.equal(encode_text(models.text_encoder, ids, skip), norm(states.hidden_states[-skip]))
    # A text encoder with one layer less, its last one dropped, is what clip_skip 2 means.
    edit_json(folder / "text_encoder/config.json", num_hidden_layers=2)
    tensors = load_file(folder / TEXT)
    save_file({key: tensor for key, tensor in tensors.items() if ".layers.2." not in key}, folder / TEXT)
    shorter = load_models(folder)
    shorter_last = encode_text(shorter.text_encoder, ids, 0)
    torch.testing.assert_close(shorter_last, encode_text(models.text_encoder, ids, 2))


def test_sd2_is_recognised(tmp_path: Path) -> None:
    models, _ = load(sd2_model(tmp_path / "sd2"))
    assert (models.kind, models.prediction_type) == ("sd2", "v_prediction")
    ids = tokenize(models, ["a red circle"])
    assert ids[0, -1] == models.tokenizer.convert_tokens_to_ids("!")
