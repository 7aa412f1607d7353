"""What belongs to a model besides tensors: its JSON configurations and tokenizer files, judged before any weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable
from utils.weights import require_file

Config = Mapping[str, Any]

COMPONENTS = ("unet", "text_encoder", "vae")
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
TEXT_MODELS = ("clip_text_model", "clip")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
# Schedulers of Diffusers that rescale their own betas. The first four keep the last alpha a little above zero; the
# others divide by it to turn predicted noise into a picture, which no v-prediction needs.
_FLOORED = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
ZERO_SNR_SCHEDULERS = {
    "epsilon": _FLOORED,
    "v_prediction": ("DDIMScheduler", *_FLOORED, "DDPMScheduler", "LCMScheduler", "TCDScheduler"),
}
MAX_JSON_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 32 << 20
# No Stable Diffusion comes near these; a configuration beyond them would only keep the machine busy building modules.
MAX_TIMESTEPS = 10_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MAX_WIDTH, MAX_LEVELS, MAX_LAYERS = 1 << 18, 8, 128


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The JSON configurations of a model's parts, as loaded, and its tokenizer's files by name."""

    unet: Config
    text_encoder: Config
    vae: Config
    scheduler: Config
    tokenizer: Mapping[str, bytes]

    def config(self, component: str) -> Config:
        """The configuration of "unet", "text_encoder" or "vae"."""
        assert component in COMPONENTS, component
        found: Config = getattr(self, component)
        return found

    @property
    def kind(self) -> str:
        """ "sd2" when the UNet's attention is entered through linear layers, as in every SD 2.x; else "sd1"."""
        return "sd2" if self.unet.get("use_linear_projection") else "sd1"

    @property
    def prediction_type(self) -> str:
        """What the UNet answers with: "epsilon" or "v_prediction"."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the model's noise schedule ends in pure noise (arXiv 2305.08891)."""
        return bool(self.scheduler.get("rescale_betas_zero_snr", False))

    def summary(self, how: str, precision: str) -> str:
        """What the model is, for the log; `how` is what says what it predicts, `precision` that of its weights."""
        snr = ", zero terminal SNR" if self.zero_terminal_snr else ""
        return f"{FAMILIES[self.kind]}, {self.prediction_type} ({how}){snr}, {precision}"


def mark_scheduler(config: Config, prediction_type: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler's configuration, marked with how the model was trained.

    With `zero_terminal_snr`, a class that cannot end in pure noise gives way: PNDM to DDIM, and for epsilon, where DDIM
    would answer with NaN, both to Euler.
    """
    marked = dict(config) | {"prediction_type": prediction_type}
    if zero_terminal_snr:
        name, able = marked.get("_class_name"), ZERO_SNR_SCHEDULERS[prediction_type]
        marked |= {
            "_class_name": name if name in able else able[0],
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    return marked


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`; `UserError` when it is missing, too large or no JSON object."""
    require_file(path, MAX_JSON_BYTES)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)} is not valid JSON ({printable(error)}); get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_model_files(folder: Path, source: str | None = None) -> ModelFiles:
    """The configurations and tokenizer files of the Diffusers folder `folder`, which the user calls `source`.

    Raises `UserError` for a part that is not there and for a model that is no Stable Diffusion 1.x or 2.x.
    Python files in the folder are neither read nor run.
    """
    name = str(folder) if source is None else source
    _check_pipeline(folder, name)
    configs = {part: read_json(_part(folder, part) / "config.json") for part in COMPONENTS}
    scheduler = read_json(_part(folder, "scheduler") / "scheduler_config.json")
    files = ModelFiles(
        unet=configs["unet"],
        text_encoder=configs["text_encoder"],
        vae=configs["vae"],
        scheduler=scheduler,
        tokenizer=read_tokenizer_files(_part(folder, "tokenizer")),
    )
    check_model_files(files, name)
    return files


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The bytes of the tokenizer files in `folder` by name; `UserError` when a CLIP vocabulary is not among them."""
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise UserError(f"{printable(folder)} holds no CLIP tokenizer: vocab.json and merges.txt are needed")
    for name in names:
        require_file(folder / name, MAX_TOKENIZER_BYTES)
    return {name: (folder / name).read_bytes() for name in names}


def check_model_files(files: ModelFiles, source: str) -> None:
    """`UserError` unless `files` describe a text-to-image Stable Diffusion 1.x or 2.x; `source` names the model."""
    name = printable(source)
    for part, expected in CLASSES.items():
        found = files.config(part).get("_class_name", expected)
        if found != expected:
            raise UserError(f"{name}: its {part} is a {printable(found)}; only {expected} can be trained")
    encoder = files.text_encoder.get("model_type", TEXT_MODELS[0])
    if encoder not in TEXT_MODELS:
        raise UserError(f"{name}: its text encoder is a {printable(encoder)}; only CLIP's can be trained")
    _check_unet(files.unet, name)
    _check_structure(files, name)
    for part in COMPONENTS:
        _check_sizes(files.config(part), f"{name}: {part}/config.json")
    _check_scale(files.vae, f"{name}: vae/config.json")
    _check_noise(files.scheduler, f"{name}: scheduler/scheduler_config.json")
    width, context = files.text_encoder.get("hidden_size"), files.unet.get("cross_attention_dim")
    if width != context:
        raise UserError(
            f"{name}: the text encoder is {width} wide and the UNet expects {context}; "
            f"the two come from different models"
        )
    if files.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{name}: prediction type {printable(files.prediction_type)!r} is not known; epsilon and v_prediction are"
        )


def _part(folder: Path, part: str) -> Path:
    if (folder / part).is_dir():
        return folder / part
    name = printable(folder)
    above = folder.resolve().parent
    singles = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if (folder / "config.json").is_file() and (above / "model_index.json").is_file():
        raise UserError(f"{name} is one part of a Diffusers model; name the folder above it, {printable(above)}")
    if singles:
        shown = ", ".join(map(printable, singles[:5])) + (", ..." if len(singles) > 5 else "")
        raise UserError(f"{name} has no folder {part}/ and is no Diffusers model, but holds {shown}; name the file")
    raise UserError(
        f"{name} has no folder {part}/, so it is no complete Diffusers model; "
        f"it needs unet/, text_encoder/, vae/, tokenizer/ and scheduler/"
    )


def _check_pipeline(folder: Path, source: str) -> None:
    """Refuse other families by name before complaining that a part of theirs is missing."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    pipeline = str(index.get("_class_name", "StableDiffusionPipeline"))
    name = printable(source)
    if "Inpaint" in pipeline:
        raise UserError(
            f"{name} is an inpainting model, which cannot be trained here; take the base model it came from"
        )
    if "XL" in pipeline or (folder / "text_encoder_2").exists():
        raise UserError(f"{name} is an SDXL model; only Stable Diffusion 1.x and 2.x can be trained so far")
    if (folder / "transformer").exists() and not (folder / "unet").exists():
        raise UserError(
            f"{name} has a transformer in place of a UNet; only Stable Diffusion 1.x and 2.x can be trained"
        )


def _check_unet(unet: Config, name: str) -> None:
    channels = unet.get("in_channels", 4)
    if channels == 9:
        raise UserError(f"{name} is an inpainting model (9 input channels); take the base model it came from")
    if channels != 4 or unet.get("out_channels", 4) != 4:
        raise UserError(f"{name}: a UNet with {printable(channels)} input channels is not for text-to-image training")
    if unet.get("addition_embed_type") is not None:
        raise UserError(f"{name} is an SDXL model; only Stable Diffusion 1.x and 2.x can be trained so far")


def _check_structure(files: ModelFiles, name: str) -> None:
    """The keys that the names of the single file follow from."""
    wanted: dict[str, dict[str, type]] = {
        "unet": {"layers_per_block": int, "up_block_types": list, "down_block_types": list, "block_out_channels": list},
        "vae": {"block_out_channels": list},
    }
    for part, keys in wanted.items():
        for key, kind in keys.items():
            if not isinstance(files.config(part).get(key), kind):
                found = printable(files.config(part).get(key))
                raise UserError(f"{name}: {part}/config.json: {key} = {found} should be a {kind.__name__}")


def _check_scale(vae: Config, name: str) -> None:
    scale = vae.get("scaling_factor", 1.0)
    if not _is_number(scale) or not 0 < scale < math.inf:
        raise UserError(f"{name}: scaling_factor = {printable(scale)} should be a number over 0; SD 1.x has 0.18215")


def _check_noise(scheduler: Config, name: str) -> None:
    """The keys that the noise schedule follows from: a wrong one would train something else, and say nothing."""
    kind = printable(scheduler.get("_class_name", ""))
    if "Flow" in kind:
        raise UserError(f"{name} is a {kind}: flow matching cannot be trained, only epsilon and v_prediction")
    steps, schedule = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    if type(steps) is not int or not 0 < steps <= MAX_TIMESTEPS:
        raise UserError(f"{name}: num_train_timesteps = {printable(steps)} should be 1 to {MAX_TIMESTEPS}, mostly 1000")
    if schedule not in BETA_SCHEDULES:
        raise UserError(f"{name}: beta_schedule = {printable(schedule)} is not known; {', '.join(BETA_SCHEDULES)} are")
    start, end = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    if not _is_number(start) or not _is_number(end) or not 0 < start <= end <= 1:
        raise UserError(
            f"{name}: beta_start = {printable(start)} and beta_end = {printable(end)} should rise in 0 to 1"
        )
    betas = scheduler.get("trained_betas")
    if betas is None:
        return
    if (
        not isinstance(betas, list)
        or len(betas) != steps
        or not all(_is_number(beta) and 0 < beta <= 1 for beta in betas)
    ):
        raise UserError(f"{name}: trained_betas should be {steps} numbers over 0 and at most 1, or null")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_sizes(config: Config, name: str) -> None:
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_LEVELS and key.endswith(("_channels", "_types")):
            raise UserError(f"{name}: {printable(key)} has {len(values)} levels; at most {MAX_LEVELS} are sensible")
        limit = MAX_LAYERS if "layers" in key else MAX_WIDTH
        for number in values:
            if isinstance(number, int) and number > limit and not key.endswith("token_id"):
                raise UserError(f"{name}: {printable(key)} = {number} is not sensible (at most {limit})")
