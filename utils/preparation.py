"""Networks made ready to train: on their device, with the attention, checkpointing and gradients asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.config import ModelOptions
from utils.device import Device
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from utils.models import Models


def prepare_networks(models: Models, options: ModelOptions, device: Device) -> dict[str, nn.Module]:
    """Move the networks to the device and return those that are trained, by name ("unet", "text_encoder").

    Raises:
        UserError: the kind of attention that was asked for is not to be had here.
    """
    models.unet.to(device.torch_device)
    models.text_encoder.to(device.torch_device)
    models.vae.to(device.torch_device)
    _set_attention(models.unet, options.attn_type, device)
    if options.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        text_encoder: Any = models.text_encoder
        # Transformers 6 will know the second name only.
        newer = getattr(text_encoder, "activation_checkpointing_enable", None)
        (text_encoder.gradient_checkpointing_enable if newer is None else newer)()
        # Both libraries checkpoint in training mode only. The UNet recomputes for the text encoder's sake, too.
        models.unet.train()
        models.text_encoder.train()
    trained: dict[str, nn.Module] = {}
    if not options.disable_unet_training:
        trained["unet"] = models.unet
    if not options.disable_textenc_training:
        trained["text_encoder"] = models.text_encoder
    for network in trained.values():
        network.requires_grad_(True).train()
    for network in (models.unet, models.text_encoder):
        _without_dropout(network)
    return trained


def _without_dropout(network: nn.Module) -> None:
    """Full fine-tuning goes without dropout, which would draw from global random state."""
    from torch import nn

    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0


def _set_attention(unet: Any, attn_type: str, device: Device) -> None:
    """sdp is what Diffusers does by itself; the others replace it."""
    if attn_type == "slice":
        unet.set_attention_slice("auto")
    elif attn_type == "xformers":
        if not device.is_cuda:
            raise UserError("attn_type = xformers needs a GPU; use sdp")
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError):
            raise UserError(
                "attn_type = xformers, but xformers is not installed; pip install xformers, or use sdp"
            ) from None
