"""Exports: what other programs read back is what was in memory, and a difference is an error."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from tests.utils.tiny_models import edit_json, load, sd1_model, sd2_model
from utils.archive import fitting_dtype
from utils.errors import UserError
from utils.export import Weights, check_folder, check_single_file, write_folder, write_single_file
from utils.models import Models, describe, load_models
from utils.prompts import SampleJob, SampleSheet
from utils.sampling import sample_pictures

PARTS = ("unet", "text_encoder", "vae")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models, Weights]:
    folder = tmp_path_factory.mktemp("made") / request.param
    (sd1_model if request.param == "sd1" else sd2_model)(folder)
    return folder, *load(folder)


def assert_same(pipeline: Any, weights: Weights, dtype: torch.dtype) -> None:
    for part in PARTS:
        found = getattr(pipeline, part).state_dict()
        assert found.keys() == weights[part].keys()
        for name, tensor in weights[part].items():
            assert torch.equal(found[name].float(), tensor.to(dtype).float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_diffusers_reads_is_what_was_in_memory(
    made: tuple[Path, Models, Weights], dtype: torch.dtype, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    folder, models, weights = made
    files = describe(models)
    write_folder(tmp_path / "out", weights, files, dtype=dtype)
    check_folder(tmp_path / "out", weights, dtype)
    assert_same(StableDiffusionPipeline.from_pretrained(tmp_path / "out"), weights, dtype)
    assert_same(load_models(tmp_path / "out"), weights, dtype)
    assert load_file(tmp_path / "out" / UNET_FILE)["conv_in.weight"].dtype == dtype

    single = tmp_path / "out.safetensors"
    write_single_file(single, weights, files, dtype=dtype)
    check_single_file(single, weights, files, dtype)
    theirs = StableDiffusionPipeline.from_single_file(single, config=str(folder), local_files_only=True)
    assert_same(theirs, weights, dtype)


def test_live_weights_are_left_alone(made: tuple[Path, Models, Weights], tmp_path: Path) -> None:
    _, models, weights = made
    before = {part: {name: tensor.clone() for name, tensor in weights[part].items()} for part in PARTS}
    write_folder(tmp_path / "out", weights, describe(models))
    write_single_file(tmp_path / "out.safetensors", weights, describe(models))
    assert all(torch.equal(tensor, before[part][name]) for part in PARTS for name, tensor in weights[part].items())


def test_the_folder_is_whole_readable_and_nothing_lies_beside_it(
    made: tuple[Path, Models, Weights], tmp_path: Path
) -> None:
    folder, models, weights = made
    write_folder(tmp_path / "out", weights, describe(models))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert all(stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o644 for name in found)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out/tokenizer" / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"][1] == "PNDMScheduler"
    assert json.loads((tmp_path / "out/text_encoder/config.json").read_text())["torch_dtype"] == "float32"
    keys = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoder_keys_have_the_prefix_whatever_transformers_calls_them(
    made: tuple[Path, Models, Weights], prefixed: bool, tmp_path: Path
) -> None:
    _, models, weights = made
    spelt = {name.removeprefix("text_model."): tensor for name, tensor in weights["text_encoder"].items()}
    if prefixed:
        spelt = {f"text_model.{name}": tensor for name, tensor in spelt.items()}
        spelt["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    live = {**weights, "text_encoder": spelt}
    write_folder(tmp_path / "out", live, describe(models), dtype=torch.float32)
    check_folder(tmp_path / "out", live, torch.float32)
    assert_same(load_models(tmp_path / "out"), weights, torch.float32)
    single = write_single_file(tmp_path / "out.safetensors", live, describe(models))[0]
    text = [key for key in load_file(single) if key.startswith("cond_stage_model.")]
    home = "cond_stage_model.transformer.text_model." if models.kind == "sd1" else "cond_stage_model.model."
    assert text
    assert all(key.startswith(home) for key in text)


def test_the_vae_attention_is_convolutions_in_the_single_file_only(
    made: tuple[Path, Models, Weights], tmp_path: Path
) -> None:
    _, models, weights = made
    single = write_single_file(tmp_path / "out.safetensors", weights, describe(models), dtype=torch.float32)[0]
    wide = load_file(single)["first_stage_model.encoder.mid.attn_1.q.weight"]
    flat = weights["vae"]["encoder.mid_block.attentions.0.to_q.weight"]
    assert wide.shape == (*flat.shape, 1, 1)
    assert torch.equal(wide[..., 0, 0], flat)


def test_markers_and_yaml_for_web_uis(made: tuple[Path, Models, Weights], tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import create_unet_diffusers_config_from_ldm

    _, models, weights = made
    written = write_single_file(tmp_path / "plain.safetensors", weights, describe(models))
    keys = load_file(written[0])
    assert ("v_pred" in keys) == (models.kind == "sd2")
    assert "ztsnr" not in keys
    assert [path.name for path in written] == ["plain.safetensors"] + ["plain.yaml"] * (models.kind == "sd2")
    zero = describe(models, zero_terminal_snr=True)
    written = write_single_file(tmp_path / "zero.safetensors", weights, zero)
    check_single_file(written[0], weights, zero)
    assert load_file(written[0])["ztsnr"].numel() == 0
    if models.kind == "sd2":
        config = yaml.safe_load((tmp_path / "plain.yaml").read_text())
        assert config["model"]["params"]["parameterization"] == "v"
        theirs = create_unet_diffusers_config_from_ldm(config, {})
        ours = describe(models).unet
        for key in ("block_out_channels", "cross_attention_dim", "layers_per_block", "use_linear_projection"):
            assert list(theirs[key]) == ours[key] if isinstance(ours[key], list) else theirs[key] == ours[key]


def test_the_hash_is_of_the_tensors_and_vouches_for_a_checked_file_only(
    made: tuple[Path, Models, Weights], tmp_path: Path
) -> None:
    _, models, weights = made
    files = describe(models)
    path = write_single_file(tmp_path / "out.safetensors", weights, files, metadata={"title": "Grün \n"})[0]

    def metadata() -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata())

    assert "modelspec.hash_sha256" not in metadata()
    check_single_file(path, weights, files)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 8 == 0
    digest = hashlib.sha256(raw[start:]).hexdigest()
    assert metadata() == {"format": "pt", "title": "Grün \n", "modelspec.hash_sha256": f"0x{digest}"}
    check_single_file(path, weights, files)
    assert path.read_bytes() == raw
    path.write_bytes(raw.replace(digest.encode(), digest[::-1].encode()))
    with pytest.raises(UserError, match="not those that its hash was made of"):
        check_single_file(path, weights, files)


def test_a_single_changed_bit_is_found(made: tuple[Path, Models, Weights], tmp_path: Path) -> None:
    _, models, weights = made
    files = describe(models)
    write_folder(tmp_path / "out", weights, files)
    write_single_file(tmp_path / "out.safetensors", weights, files)
    for path in (tmp_path / "out" / UNET_FILE, tmp_path / "out.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    with pytest.raises(UserError, match="differs from the model in memory"):
        check_folder(tmp_path / "out", weights)
    with pytest.raises(UserError, match="differs from the model in memory"):
        check_single_file(tmp_path / "out.safetensors", weights, files)
    raw[-1:] = b""
    (tmp_path / "out.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        check_single_file(tmp_path / "out.safetensors", weights, files)


def test_lost_tensors_and_numbers_that_do_not_fit_are_found(made: tuple[Path, Models, Weights], tmp_path: Path) -> None:
    _, models, weights = made
    files = describe(models)
    fewer = {**weights, "unet": {k: t for k, t in weights["unet"].items() if k != "conv_in.bias"}}
    write_folder(tmp_path / "out", fewer, files)
    with pytest.raises(UserError, match=r"conv_in\.bias"):
        check_folder(tmp_path / "out", weights)
    huge = {**weights, "unet": {**weights["unet"], "conv_in.bias": torch.full((16,), 1e6)}}
    write_folder(tmp_path / "huge", huge, files)
    with pytest.raises(UserError, match=r"16 of 16 numbers in conv_in\.bias are too large for float16.*full precision"):
        check_folder(tmp_path / "huge", huge)
    write_folder(tmp_path / "full", huge, files, dtype=torch.float32)
    check_folder(tmp_path / "full", huge, torch.float32)


@pytest.mark.parametrize(
    ("number", "fits"), [(65504.0, True), (-65504.0, True), (7e4, False), (-7e4, False), (float("nan"), False)]
)
def test_a_weight_that_half_precision_cannot_hold_makes_the_file_full(number: float, fits: bool) -> None:
    weights = {"unet": {"a": torch.zeros(3), "b": torch.tensor([0.5, number])}, "vae": {"c": torch.ones(1).bfloat16()}}
    assert fitting_dtype(weights, torch.float16) == (torch.float16 if fits else torch.float32)
    assert fitting_dtype(weights, torch.float32) == torch.float32


def test_a_tokenizer_in_one_file_gets_those_that_older_programs_need(
    made: tuple[Path, Models, Weights], tmp_path: Path
) -> None:
    folder, models, weights = made
    models.tokenizer.save_pretrained(tmp_path / "new")
    modern = (tmp_path / "new/tokenizer.json").read_bytes()
    files = replace(describe(models), tokenizer={"tokenizer.json": modern})
    write_folder(tmp_path / "out", weights, files)
    written = tmp_path / "out/tokenizer"
    assert json.loads((written / "vocab.json").read_text()) == json.loads((folder / "tokenizer/vocab.json").read_text())
    assert (written / "merges.txt").read_text() == (folder / "tokenizer/merges.txt").read_text()


def test_no_path_of_the_machine_goes_out_with_the_folder(tmp_path: Path) -> None:
    folder = sd1_model(tmp_path / "model")
    for part in PARTS:
        edit_json(folder / part / "config.json", _name_or_path="/home/me/models/x")
    edit_json(folder / "tokenizer/tokenizer_config.json", name_or_path="/home/me/models/x")
    models, weights = load(folder)
    write_folder(tmp_path / "out", weights, describe(models))
    check_folder(tmp_path / "out", weights)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"/home/me" in path.read_bytes()]
    edit_json(folder / "tokenizer/tokenizer_config.json", name_or_path="openai/clip-vit-large-patch14")
    write_folder(tmp_path / "kept", weights, describe(load_models(folder)))
    name = "tokenizer/tokenizer_config.json"
    assert (tmp_path / "kept" / name).read_bytes() == (folder / name).read_bytes()


def test_a_full_disk_is_an_oserror_not_a_hang(made: tuple[Path, Models, Weights]) -> None:
    _, models, weights = made
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_single_file(Path("/dev/full"), weights, describe(models))


@pytest.mark.parametrize("make", [sd1_model, sd2_model])
def test_pictures_agree_between_our_sampler_and_both_exports(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = make(tmp_path / "model")
    models, weights = load(folder)
    files = describe(models)
    write_folder(tmp_path / "out", weights, files)
    single = write_single_file(tmp_path / "out.safetensors", weights, files)[0]
    shutil.rmtree(folder)  # nothing may come from the model that was trained
    job = SampleJob(0, "a red circle", "blue", 3, 64, 64, (4.0,))
    ((live,),) = sample_pictures(models, SampleSheet((job,), scheduler="ddim", steps=6))
    exported = [
        StableDiffusionPipeline.from_pretrained(tmp_path / "out"),
        StableDiffusionPipeline.from_single_file(single, config=str(tmp_path / "out"), local_files_only=True),
    ]
    pictures = [np.asarray(live).astype(int)]
    for pipeline in exported:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        arguments: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "height": 64, "width": 64}
        generator = torch.Generator().manual_seed(3)
        drawn = pipeline("a red circle", negative_prompt="blue", generator=generator, **arguments).images[0]
        pictures.append(np.asarray(drawn).astype(int))
    assert pictures[0].std() > 3
    assert np.abs(pictures[1] - pictures[0]).max() <= 3  # fp16 keeps 11 bits of every weight
    assert np.array_equal(pictures[1], pictures[2])
