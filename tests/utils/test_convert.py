"""Single files in, and both ways through `python -m utils.convert`: nothing lost, nothing guessed in silence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.utils.tiny_models import edit_json, load, sd1_model, sd2_model, tensors_of
from utils.convert import convert, main
from utils.errors import UserError
from utils.models import load_models
from utils.source import Wanted

ROOT = Path(__file__).parents[2]
UNET = "model.diffusion_model."


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and the single file made of it in full precision."""
    home = tmp_path_factory.mktemp("pair")
    folder = (sd1_model if request.param == "sd1" else sd2_model)(home / "model")
    convert(str(folder), home / "model.safetensors", fp32=True)
    return folder, home / "model.safetensors"


def assert_same_models(one: Any, other: Any) -> None:
    a, b = tensors_of(one), tensors_of(other)
    for part in a:
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(tensor, b[part][name]) for name, tensor in a[part].items()), part


def test_file_to_folder_to_file_changes_no_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    wanted = Wanted(model_config=str(folder))
    convert(str(single), tmp_path / "back", wanted=wanted, fp32=True)
    assert_same_models(load_models(tmp_path / "back"), load_models(folder))
    convert(str(tmp_path / "back"), tmp_path / "again.safetensors", fp32=True)
    first, second = load_file(single), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The data section is the same to the byte; only date and title in the header may differ.
    assert single.read_bytes()[-(1 << 20) :] == (tmp_path / "again.safetensors").read_bytes()[-(1 << 20) :]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".yaml") == ["again.safetensors", "back"]


def test_a_single_file_trains_like_its_folder(pair: tuple[Path, Path]) -> None:
    folder, single = pair
    from_file = load_models(single, Wanted(model_config=str(folder)))
    from_folder = load_models(folder)
    assert_same_models(from_file, from_folder)
    assert from_file.files.scheduler == from_folder.files.scheduler
    assert from_file.files.tokenizer == from_folder.files.tokenizer


def test_half_precision_by_default(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    convert(str(folder), tmp_path / "half.safetensors")
    full = load_file(single)
    for name, tensor in load_file(tmp_path / "half.safetensors").items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, full[name].half())


def test_checkpoints_with_strangers_inside_are_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    path = tmp_path / "old.ckpt"
    content = {"state_dict": load_file(single), "global_step": 7, "callbacks": {Path: {"best": Path("x")}}}
    torch.save(content, path)
    assert_same_models(load_models(path, Wanted(model_config=str(folder))), load_models(folder))


def test_older_spellings_of_the_text_encoder_are_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    tensors = load_file(single)
    is_sd1 = any(name.startswith("cond_stage_model.transformer.") for name in tensors)
    sgm = {name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor for name, tensor in tensors.items()}
    bare = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    for spelling in [sgm, bare] if is_sd1 else [sgm]:
        assert spelling.keys() != tensors.keys()
        save_file(spelling, tmp_path / "old.safetensors")
        assert_same_models(
            load_models(tmp_path / "old.safetensors", Wanted(model_config=str(folder))), load_models(folder)
        )


@pytest.mark.parametrize("words", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")])
def test_attention_of_the_vae_in_the_words_of_the_folder_is_read(
    words: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, single = pair
    table = dict(zip(("q", "k", "v", "proj_out"), words, strict=True))
    spelt = {
        re.sub(r"(mid\.attn_1\.)(q|k|v|proj_out)\.", lambda found: f"{found[1]}{table[found[2]]}.", name): tensor
        for name, tensor in load_file(single).items()
    }
    assert spelt.keys() != load_file(single).keys()
    save_file(spelt | {"first_stage_model.encoder.mid.attn_1.odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    read = load_models(tmp_path / "odd.safetensors", Wanted(model_config=str(folder)))
    assert_same_models(read, load_models(folder))


def test_leftovers_of_the_original_training_are_ignored(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    extra = {
        "alphas_cumprod": torch.zeros(3),
        "model_ema.decay": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": torch.zeros(3),
        "cond_stage_model.model.text_projection": torch.zeros(3, 3),
        "cond_stage_model.model.logit_scale": torch.zeros(()),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    save_file({**load_file(single), **extra}, tmp_path / "full.safetensors")
    read = load_models(tmp_path / "full.safetensors", Wanted(model_config=str(folder)))
    assert_same_models(read, load_models(folder))


def test_ema_weights_are_taken_when_asked_for_or_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    tensors = load_file(single)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    ema = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor + 1 for name, tensor in unet.items()}
    save_file({**tensors, **ema}, tmp_path / "both.safetensors")
    plain = load_models(tmp_path / "both.safetensors", Wanted(model_config=str(folder)))
    averaged = load_models(tmp_path / "both.safetensors", Wanted(model_config=str(folder), ema=True))
    for name, tensor in plain.unet.state_dict().items():
        assert torch.equal(averaged.unet.state_dict()[name], tensor + 1)
    assert "averaged weights are left alone, model_ema would take them" in plain.told
    assert averaged.told.endswith("averaged weights (model_ema)")
    assert_same_models(plain, load_models(folder))
    with pytest.raises(UserError, match="no averaged weights"):
        load_models(single, Wanted(model_config=str(folder), ema=True))


@pytest.mark.parametrize("pair", ["sd2"], indirect=True)
def test_what_the_model_predicts_is_found_and_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    epsilon = sd2_model(tmp_path / "epsilon", prediction_type="epsilon")
    tensors = load_file(single)
    assert "v_pred" in tensors

    def read(config: Path, wanted: str | None = None, **metadata: str) -> str:
        save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
        models = load_models(tmp_path / "model.safetensors", Wanted(model_config=str(config), prediction_type=wanted))
        assert f"Stable Diffusion 2.x, {models.prediction_type}" in models.told
        return f"{models.prediction_type} {models.told.partition('(')[2]}"

    assert read(epsilon).startswith("v_prediction by the marker")
    assert read(epsilon, **{"modelspec.prediction_type": "epsilon"}).startswith("epsilon by the file's metadata")
    assert read(epsilon, "epsilon").startswith("epsilon as you said")
    del tensors["v_pred"]
    assert read(epsilon).startswith("epsilon by model_config")
    assert read(folder).startswith("v_prediction by model_config")
    (tmp_path / "model.yaml").write_text("model: {params: {parameterization: v}}")
    assert read(epsilon).startswith("v_prediction by model.yaml")
    (tmp_path / "model.yaml").write_text("model: [unbalanced")
    assert read(epsilon).startswith("epsilon by model_config")


def test_sd2_without_a_word_is_judged_by_its_weights(tmp_path: Path) -> None:
    from utils.single_file import TELLTALE, open_single_file

    first = {f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    context = {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024)}
    rest = {"first_stage_model.x": torch.zeros(1), "cond_stage_model.model.x": torch.zeros(1)}
    path = tmp_path / "sd2.safetensors"
    for spread, expected, size in ((0.2, "v_prediction", 96), (0.02, "epsilon", 64)):
        telltale = {TELLTALE: torch.linspace(-1, 1, 320) * spread * 3**0.5}
        save_file({**first, **context, **rest, **telltale}, path)
        single = open_single_file(path)
        assert (single.files.kind, single.files.prediction_type) == ("sd2", expected)
        assert single.files.unet["sample_size"] == size
        assert "by its weights" in single.told
    assert open_single_file(path, prediction_type="v_prediction").files.prediction_type == "v_prediction"


def test_zero_terminal_snr_survives_the_single_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = pair
    marked = Path(shutil.copytree(folder, tmp_path / "marked"))
    edit_json(marked / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, _class_name="DDIMScheduler")
    convert(str(marked), tmp_path / "zero.safetensors")
    read = load_models(tmp_path / "zero.safetensors", Wanted(model_config=str(folder)))
    assert read.zero_terminal_snr
    assert "zero terminal SNR" in read.told
    assert read.scheduler_config["timestep_spacing"] == "trailing"


def test_the_tokenizer_comes_from_beside_the_file_or_the_error_says_what_to_do(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from utils.source import find_tokenizer

    folder, single = pair
    shutil.copy(single, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"brings no tokenizer.*HF_HUB_OFFLINE.*model_config"):
        find_tokenizer(tmp_path / "model.safetensors", "sd1")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    found = find_tokenizer(tmp_path / "model.safetensors", "sd1")
    assert found["vocab.json"] == (folder / "tokenizer/vocab.json").read_bytes()


def test_strangers_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, single = pair
    tensors = load_file(single)
    conv = f"{UNET}input_blocks.0.0.weight"
    home = "cond_stage_model."
    for changed, match in (
        ({**tensors, conv: torch.zeros(16, 9, 3, 3)}, "inpainting"),
        ({**tensors, conv: torch.zeros(16, 5, 3, 3)}, "depth"),
        ({**tensors, "conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}, "SDXL"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "LoRA"),
        ({"conv_in.weight": torch.zeros(1)}, "no Stable Diffusion 1.x or 2.x"),
        ({k: t for k, t in tensors.items() if not k.startswith(home)}, "no text encoder"),
        ({k: t for k, t in tensors.items() if not k.startswith("first_stage_model.")}, "no VAE"),
        ({k: t for k, t in tensors.items() if k != f"{UNET}out.2.bias"}, r"lacks 1 tensor that.*out\.2\.bias"),
        ({**tensors, f"{UNET}input_blocks.99.0.x": torch.zeros(1)}, r"holds 1 tensor that.*input_blocks\.99"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=match):
            load_models(tmp_path / "model.safetensors", Wanted(model_config=str(folder)))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unusual text width \(32\).*model_config"):
        load_models(tmp_path / "model.safetensors")
    for wrong in (str(single), "no/such"):
        with pytest.raises(UserError, match=f"model_config: .*{wrong}"):
            load_models(single, Wanted(model_config=wrong))


def test_a_description_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    folders = {"1": sd1_model(tmp_path / "sd1"), "2": sd2_model(tmp_path / "sd2")}
    for kind, other in (("1", "2"), ("2", "1")):
        convert(str(folders[kind]), tmp_path / f"{kind}.safetensors")
        with pytest.raises(
            UserError, match=rf"is Stable Diffusion {kind}\.x, but model_config describes .* {other}\.x"
        ):
            load_models(tmp_path / f"{kind}.safetensors", Wanted(model_config=str(folders[other])))


def test_a_conversion_that_fails_leaves_nothing_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = pair
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    path = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = float("inf")
    save_file(tensors, path)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    for target, match in (
        (tmp_path / "new", "NaN or infinite"),
        (tmp_path / "new.safetensors", "NaN or infinite"),
        (tmp_path / "there", "there already"),
        (tmp_path / "x.ckpt", "pickles are not written"),
        (tmp_path / "nowhere/x", "no folder"),
    ):
        with pytest.raises(UserError, match=match):
            convert(str(broken), target)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("pair", ["sd2"], indirect=True)
def test_a_yaml_that_lies_there_is_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"new\.yaml is there already"):
        convert(str(pair[0]), tmp_path / "new.safetensors")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.yaml", "mine")]


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_what_half_precision_cannot_hold_is_said_with_the_remedy(pair: tuple[Path, Path], tmp_path: Path) -> None:
    large = Path(shutil.copytree(pair[0], tmp_path / "large"))
    path = large / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, path)
    for target, name in (
        ("out.safetensors", "out.safetensors"),
        ("out", "out/unet/diffusion_pytorch_model.safetensors"),
    ):
        with pytest.raises(
            UserError, match=rf"^{tmp_path}/{name}: 1 of 16 numbers .* too large for float16.*full prec"
        ):
            convert(str(large), tmp_path / target)
    assert [found.name for found in tmp_path.iterdir()] == ["large"]
    convert(str(large), tmp_path / "Out.SAFETENSORS", fp32=True)
    assert load_file(tmp_path / "Out.SAFETENSORS")[f"{UNET}input_blocks.0.0.bias"][0] == 1e6


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_a_full_disk_is_said_in_words_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        codes = [main([str(pair[0]), str(tmp_path / name)]) for name in ("out.safetensors", "out")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert codes == [75, 75]
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(" (")[0] for line in said.err.splitlines()] == [
        f"error: there is no room for {tmp_path / name}" for name in ("out.safetensors", "out")
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_the_command_converts_and_its_errors_are_words(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = pair
    command = [sys.executable, "-m", "utils.convert"]
    done = subprocess.run(
        [*command, str(folder), str(tmp_path / "out.safetensors"), "--title", "My model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Stable Diffusion" in done.stdout
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "My model"
        assert file.metadata()["modelspec.sai_model_spec"] == "1.0.0"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_a_damaged_tokenizer_is_not_passed_on(pair: tuple[Path, Path], name: str, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pair[0], tmp_path / "damaged"))
    if name == "tokenizer.json":
        (damaged / "tokenizer/vocab.json").unlink()
    (damaged / "tokenizer" / name).write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        convert(str(damaged), tmp_path / "out")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no such model"), str(tmp_path / "out")]) == 2
    assert "there is no model" in capsys.readouterr().err
    assert main([str(tmp_path / "none.safetensors"), str(tmp_path / "out")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_diffusers_reads_the_folder_made_of_a_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder, single = pair
    convert(str(single), tmp_path / "out", wanted=Wanted(model_config=str(folder)), fp32=True)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_same_models(theirs, load(folder)[0])
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text()) == json.loads(
        (folder / "scheduler/scheduler_config.json").read_text()
    )
