"""The networks of a Stable Diffusion: loaded and checked, with their noise schedule, tokens and text embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable
from utils.model_files import COMPONENTS, ModelFiles, read_model_files
from utils.weights import folder_weights, require_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
    from torch import LongTensor, Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}
# Those that rescale their own betas; for any other class of the export, sampling would not end in pure noise.
ZERO_SNR_SCHEDULERS = frozenset(
    "DDPMScheduler DDIMScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler "
    "DPMSolverMultistepScheduler UniPCMultistepScheduler LCMScheduler TCDScheduler".split()
)
WEIGHT_STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
PREFIX = "text_model."


@dataclass(slots=True)
class Models:
    """The networks of a Stable Diffusion and what belongs to them."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    files: ModelFiles
    source: str

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """`scheduler/scheduler_config.json` as loaded."""
        return self.files.scheduler

    @property
    def kind(self) -> str:
        """ "sd1" or "sd2"."""
        return self.files.kind

    @property
    def prediction_type(self) -> str:
        """What the UNet answers with: "epsilon" or "v_prediction"."""
        return self.files.prediction_type

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the model came with a schedule that ends in pure noise."""
        return self.files.zero_terminal_snr

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, 4."""
        return int(self.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels along a side that become one latent, 8."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_scale(self) -> float:
        """The factor that brings the VAE's latents to unit variance, 0.18215 for SD 1.x and 2.x."""
        return float(self.vae.config.scaling_factor)

    @property
    def context_width(self) -> int:
        """Width of the text embedding that the UNet expects: 768 or 1024."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def max_tokens(self) -> int:
        """Positions of the text encoder, 77, start and end included."""
        return int(self.text_encoder.config.max_position_embeddings)


def load_models(source: str | Path, *, variant: str | None = None) -> Models:
    """The model in the Diffusers folder `source`: fp32 on the CPU, in eval mode, no parameter asking for gradients.

    Every tensor is checked for its name, shape and finiteness. Raises `UserError` that says what is wrong.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"there is no model folder {printable(source)}")
    files = read_model_files(folder)
    weights = {part: folder_weights(folder / part, WEIGHT_STEMS[part], variant) for part in COMPONENTS}
    return build_models(files, weights, str(source))


def build_models(files: ModelFiles, weights: Mapping[str, Mapping[str, Tensor]], source: str) -> Models:
    """Networks of the configurations `files` with copies of the tensors `weights` in them; `source` is for messages."""
    networks = empty_networks(files)
    for part, network in networks.items():
        _fill(network, weights[part], f"{source}: {part}")
    return Models(
        unet=networks["unet"],
        text_encoder=networks["text_encoder"],
        vae=networks["vae"],
        tokenizer=build_tokenizer(files),
        files=files,
        source=source,
    )


def empty_networks(files: ModelFiles) -> dict[str, Any]:
    """The three networks by name on the meta device: names and shapes without memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(dict(files.unet)),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(files.text_encoder))),
            "vae": AutoencoderKL.from_config(dict(files.vae)),
        }


def build_tokenizer(files: ModelFiles) -> CLIPTokenizer:
    """The tokenizer whose files are in `files`; nothing is looked for elsewhere."""
    from tempfile import TemporaryDirectory

    from transformers import CLIPTokenizer

    with TemporaryDirectory(prefix="emulsion-") as scratch:
        for name, content in files.tokenizer.items():
            (Path(scratch) / name).write_bytes(content)
        return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Replace the meta tensors of `network` by fp32 copies of `tensors`, which may be views of a file."""
    import torch

    ours = match_names(network, tensors, name)
    state = {}
    for key, expected in network.state_dict().items():
        tensor = ours.pop(key)
        if tensor.shape != expected.shape:
            # Attention of the VAE was once stored as 1x1 convolutions.
            if tensor.shape != (*expected.shape, 1, 1):
                raise UserError(
                    f"{printable(name)}: {key} has shape {tuple(tensor.shape)} where {tuple(expected.shape)} is "
                    f"expected; configuration and weights come from different models"
                )
            tensor = tensor[..., 0, 0]
        if not tensor.is_floating_point():
            raise UserError(f"{printable(name)}: {key} holds {tensor.dtype}, which are no weights")
        require_finite(key, tensor, name)
        state[key] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(state, strict=True, assign=True)
    for buffer_name, buffer in network.named_buffers():
        if buffer.is_meta:
            assert buffer_name.endswith("position_ids"), buffer_name
            module = network.get_submodule(buffer_name.rpartition(".")[0])
            module.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    network.requires_grad_(False).eval()


def match_names(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """`tensors` under the names that `network` uses; `UserError` that lists what is missing or left over."""
    wanted = set(network.state_dict())
    ours = {_our_name(key, wanted): tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
    missing, unexpected = sorted(wanted - set(ours)), sorted(set(ours) - wanted)
    if missing or unexpected:
        parts = [
            f"{len(keys)} {word} ({', '.join(map(printable, keys[:3]))}{', ...' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise UserError(f"{printable(name)}: the weights do not fit the configuration: {'; '.join(parts)}")
    return ours


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _our_name(key: str, wanted: set[str]) -> str:
    """`key` as this version of Transformers and Diffusers spells it."""
    if key in wanted:
        return key
    for spelling in (key.removeprefix(PREFIX), PREFIX + key):
        if spelling in wanted:
            return spelling
    module, _, leaf = key.rpartition(".")
    parent, _, last = module.rpartition(".")
    modern = f"{parent}.{_OLD_ATTENTION.get(last, last)}.{leaf}"
    return modern if modern in wanted else key


def noise_scheduler(models: Models, name: str = "ddpm", zero_terminal_snr: bool = False) -> SchedulerMixin:
    """The Diffusers scheduler `name` ("ddpm", "ddim" or "pndm") with the noise schedule of the model.

    With `zero_terminal_snr`, or when the model was trained so, the betas are rescaled to end in pure noise
    (arXiv 2305.08891, algorithm 1).
    """
    import diffusers
    import torch
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    cls = getattr(diffusers, SCHEDULERS[name])
    config = {key: value for key, value in models.scheduler_config.items() if not key.startswith("_")}
    rescale = zero_terminal_snr or models.zero_terminal_snr
    config |= {"rescale_betas_zero_snr": False, "clip_sample": config.get("clip_sample", False)}
    scheduler = cls.from_config({key: config[key] for key in config if key in _parameters(cls)})
    if rescale:
        # PNDM has no option for it, so the betas are handed to every class alike.
        betas = rescale_zero_terminal_snr(scheduler.betas.clone())
        scheduler = cls.from_config(scheduler.config, trained_betas=betas.tolist())
    assert isinstance(scheduler.alphas_cumprod, torch.Tensor)
    return scheduler


def _parameters(cls: type) -> set[str]:
    import inspect

    return set(inspect.signature(cls).parameters)


def tokenize(models: Models, captions: Sequence[str]) -> LongTensor:
    """Token numbers `(B, 77)`: start, at most 75 tokens of the caption, end, padding."""
    if not captions:
        raise AssertionError("no captions to tokenize")
    return models.tokenizer(  # type: ignore[no-any-return]
        list(captions), padding="max_length", truncation=True, max_length=models.max_tokens, return_tensors="pt"
    ).input_ids


def count_tokens(models: Models, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption without start and end; over `max_tokens - 2` the rest is cut by `tokenize`."""
    if not captions:
        return []
    return [len(ids) for ids in models.tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]


def encode_text(text_encoder: nn.Module, input_ids: Tensor, clip_skip: int) -> Tensor:
    """The text embedding `(B, 77, W)` that the UNet reads.

    `clip_skip` 0 and 1 give the last hidden state after the final layer norm, n the n-th hidden state from the end
    with the final layer norm applied to it. SD 2.x encoders have dropped their last layer already.
    """
    if clip_skip <= 1:
        return text_encoder(input_ids).last_hidden_state  # type: ignore[no-any-return]
    states = text_encoder(input_ids, output_hidden_states=True).hidden_states
    assert clip_skip < len(states), f"clip_skip {clip_skip} of {len(states) - 1} layers"
    return final_layer_norm(text_encoder)(states[-clip_skip])  # type: ignore[no-any-return]


def final_layer_norm(text_encoder: nn.Module) -> nn.Module:
    """The last norm of the text encoder, wherever this version of Transformers keeps it, inside any wrapper."""
    inner: Any = getattr(text_encoder, "module", text_encoder)
    return getattr(inner, "text_model", inner).final_layer_norm  # type: ignore[no-any-return]


def describe(models: Models, *, zero_terminal_snr: bool = False) -> ModelFiles:
    """All that an export needs besides tensors, the scheduler marked with how the model was trained.

    A class of scheduler that cannot end in pure noise (PNDM) gives way to DDIM when `zero_terminal_snr` asks for it.
    """
    config = dict(models.scheduler_config) | {"prediction_type": models.prediction_type}
    if zero_terminal_snr or models.zero_terminal_snr:
        known = config.get("_class_name") in ZERO_SNR_SCHEDULERS
        config |= {
            "_class_name": config["_class_name"] if known else "DDIMScheduler",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    return replace(models.files, scheduler=config)
