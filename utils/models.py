"""The networks of a Stable Diffusion: loaded and checked, with their noise schedule, tokens and text embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, printable
from utils.keymap import disk_name, key_map
from utils.model_files import ModelFiles, mark_scheduler
from utils.source import Parts, Wanted, read_source
from utils.weights import first_line, require_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
    from torch import LongTensor, Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}
# What text encoders of some origins bring along and Stable Diffusion does not use.
LEFTOVERS = ("position_ids", "text_projection.weight", "logit_scale")
Networks = dict[str, Any]  # "unet", "text_encoder", "vae"


@dataclass(slots=True)
class Models:
    """The networks of a Stable Diffusion and what belongs to them.

    Args:
        files: configurations and tokenizer as loaded.
        source: what the user named.
        told: one line for the log: kind, prediction type, and what says so.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    files: ModelFiles
    source: str
    told: str = ""

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


def load_models(source: str | Path, wanted: Wanted | None = None) -> Models:
    """The model `source`: fp32 on the CPU, in eval mode, no parameter asking for gradients.

    Args:
        source: a Diffusers folder, a `.safetensors` or `.ckpt` file, or a Hugging Face repository id.
        wanted: what the user said about it: variant, revision, prediction type.

    Every tensor is checked for its name, shape and finiteness. Raises `UserError` that says what is wrong.
    """
    found = read_source(source, wanted)
    networks = empty_networks(found.files)
    names = disk_names(networks)
    key_map(found.files, names)  # a network that could not be exported is refused now, not at the first checkpoint
    weights = found.parts(names)
    return _assembled(found.files, networks, weights, found.name, found.told)


def build_models(files: ModelFiles, weights: Mapping[str, Mapping[str, Tensor]], source: str) -> Models:
    """Networks of the configurations `files` with fp32 copies of the tensors `weights`; `source` is for messages."""
    return _assembled(files, empty_networks(files), weights, source, "")


def _assembled(files: ModelFiles, networks: Networks, weights: Parts, source: str, told: str) -> Models:
    for part, network in networks.items():
        _fill(network, fitted(part, network, weights[part], source))
    return Models(**networks, tokenizer=build_tokenizer(files), files=files, source=source, told=told)


def empty_networks(files: ModelFiles) -> Networks:
    """The three networks by name on the meta device: names and shapes without memory.

    Raises `UserError` when a configuration describes no network.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    makers: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel.from_config(dict(files.unet)),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig.from_dict(dict(files.text_encoder))),
        "vae": lambda: AutoencoderKL.from_config(dict(files.vae)),
    }
    networks = {}
    for part, make in makers.items():
        try:
            with torch.device("meta"):
                networks[part] = make()
        # The configuration is a stranger's; the libraries check little of it and raise what comes.
        except Exception as error:  # noqa: BLE001
            raise UserError(f"the configuration of {part} describes no network: {first_line(error)}") from None
    return networks


def disk_names(networks: Networks) -> dict[str, list[str]]:
    """The names on disk of every tensor of the three networks."""
    return {part: [disk_name(part, name) for name in network.state_dict()] for part, network in networks.items()}


def build_tokenizer(files: ModelFiles) -> CLIPTokenizer:
    """The tokenizer whose files are in `files`; nothing is looked for elsewhere.

    Raises `UserError` when they are damaged, or name more pieces of words than the text encoder knows.
    """
    from tempfile import TemporaryDirectory

    from transformers import CLIPTokenizer

    with TemporaryDirectory(prefix="emulsion-") as scratch:
        for name, content in files.tokenizer.items():
            (Path(scratch) / name).write_bytes(content)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(scratch, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - a stranger's files again
            raise UserError(f"the model's tokenizer cannot be read: {first_line(error)}; get its files again") from None
    known = files.text_encoder.get("vocab_size", len(tokenizer))
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} pieces of words and the text encoder knows {known}; "
            f"the two come from different models"
        )
    return tokenizer


def fitted(part: str, network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`tensors` under the names `network` has in memory, every one of the right shape and finite, still views of files.

    Raises `UserError` that names what is missing, left over, of another shape, or damaged.
    """
    name = f"{source}: {part}"
    state = network.state_dict()
    spelt = {disk_name(part, key): key for key in state}
    given = {disk_name(part, key): tensor for key, tensor in tensors.items() if not key.endswith(LEFTOVERS)}
    strays = {"missing": sorted(set(spelt) - set(given)), "unexpected": sorted(set(given) - set(spelt))}
    listed = [
        f"{len(keys)} {word} ({', '.join(map(printable, keys[:3]))}{', ...' if len(keys) > 3 else ''})"
        for word, keys in strays.items()
        if keys
    ]
    if listed:
        raise UserError(f"{printable(name)}: the weights do not fit the configuration: {'; '.join(listed)}")
    return {ours: _fitting(ours, given[disk], state[ours], name) for disk, ours in spelt.items()}


def _fitting(key: str, tensor: Tensor, expected: Tensor, name: str) -> Tensor:
    if tensor.shape == (*expected.shape, 1, 1):
        tensor = tensor[..., 0, 0]  # attention of the VAE was once stored as 1x1 convolutions
    if tensor.shape != expected.shape:
        raise UserError(
            f"{printable(name)}: {key} has shape {tuple(tensor.shape)} where {tuple(expected.shape)} is expected; "
            f"configuration and weights come from different models"
        )
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise UserError(f"{printable(name)}: {key} holds {tensor.dtype}; take the model in fp16, bf16 or fp32")
    require_finite(key, tensor, name)
    return tensor


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the meta tensors of `network` by fp32 copies of `tensors`."""
    import torch

    copies = {
        key: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    network.load_state_dict(copies, strict=True, assign=True)
    for name, buffer in network.named_buffers():
        if buffer.is_meta:
            assert name.endswith("position_ids"), name
            home = network.get_submodule(name.rpartition(".")[0])
            home.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    network.requires_grad_(False).eval()


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
    """All that an export needs besides tensors, the scheduler marked with how the model was trained."""
    zero_snr = zero_terminal_snr or models.zero_terminal_snr
    return replace(models.files, scheduler=mark_scheduler(models.scheduler_config, models.prediction_type, zero_snr))
