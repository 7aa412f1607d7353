"""Pretraining of the starter's autoencoder on the world and on doodles."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from starter.world import BACKGROUNDS, COLOURS, EXTREMES, SHAPES, SIZES, ZORP, doodle, draw, random_scene
from utils.seeding import stream, tensor_stream

KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
DOODLES = 0.3
CROP = 32
SHAKE = 0.08


def pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def vae_batch(seed: int, step: int, count: int) -> Tensor:
    """The pictures of one step, all of one size: every shape, the new one too, on every background, and doodles.

    The new shape belongs here as it would for any autoencoder: it knows pictures, not words.
    """
    rng = stream(seed, "vae", step)
    size = rng.choice(SIZES)
    pictures = []
    for _ in range(count):
        if rng.random() < DOODLES:
            pictures.append(doodle(rng, size))
            continue
        scene = random_scene(
            rng,
            shapes=(*SHAPES, ZORP),
            colours=tuple(COLOURS),
            backgrounds=(*BACKGROUNDS, *EXTREMES),
            sizes=(size,),
        )
        pictures.append(draw(scene, rng))
    return pixels(pictures)


def vae_loss(vae: Any, batch: Tensor, noise: Tensor) -> Tensor:
    """L1 of the pixels and of their differences to the neighbours, and a small pull of the latents to N(0, 1)."""
    posterior = vae.encode(batch).latent_dist
    latents = posterior.mean + posterior.std * noise
    error: Tensor = vae.decode(latents).sample - batch
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence: Tensor = posterior.kl().mean() / latents[0].numel()
    return error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * divergence


def open_start(vae: Any, *, seed: int) -> None:
    """Set the weights so that the untrained autoencoder hands all four latent channels on.

    With the default weights all latents begin as copies of the brightness and it takes thousands of updates to tell
    colours apart. Here every convolution begins as an orthogonal mix of channels at its centre, and the residual
    branches begin small.
    """
    chance = tensor_stream(seed, "vae start")
    with torch.no_grad():
        for name, layer in vae.named_modules():
            if not isinstance(layer, nn.Conv2d):
                continue
            mix = nn.init.orthogonal_(torch.empty(layer.weight.shape[:2]), generator=chance)
            layer.weight.zero_()
            layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = mix
            if name.endswith("conv2"):
                nn.init.orthogonal_(layer.weight, 0.1, generator=chance)
            if layer.bias is not None:
                layer.bias.zero_()
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -5.0


def train_vae(
    vae: Any, *, seed: int, crop_steps: int, full_steps: int, lr: float = 1e-3, after: Callable[[int], None]
) -> None:
    """Train `vae` in place: on 32-pixel crops first, which cost a quarter, then on whole pictures.

    AdamW, `rate`. `after(step)` is called every 500 steps; prints the loss as it goes.
    """
    open_start(vae, seed=seed)
    steps = crop_steps + full_steps
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, crop_steps, full_steps))
    vae.train()
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        batch = cropped(vae_batch(seed, step, 16), seed, step) if step <= crop_steps else vae_batch(seed, step, 8)
        shape = (len(batch), 4, batch.shape[2] // 8, batch.shape[3] // 8)
        noise = torch.randn(shape, generator=tensor_stream(seed, "vae noise", step))
        loss = vae_loss(vae, batch, noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 50 == 0:
            print(f"vae {step}/{steps} loss {running / 50:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if step % 500 == 0 or step == steps:
            after(step)
    vae.eval()


def polish_decoder(vae: Any, *, seed: int, steps: int, lr: float = 6e-4, after: Callable[[int], None]) -> None:
    """Train the decoder alone, on whole pictures: corners get sharper and no latent changes.

    The latents are shaken a little more than the encoder does, as a UNet does not hit them exactly. AdamW, a cosine to
    zero; `after(step)` is called every 200 steps.
    """
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps, 30))
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        batch = vae_batch(seed, 10**6 + step, 8)
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean
        noise = torch.randn(latents.shape, generator=tensor_stream(seed, "decoder noise", step))
        error: Tensor = vae.decode(latents + SHAKE * noise).sample - batch
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + EDGE_WEIGHT * edges
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 50 == 0:
            print(f"decoder {step}/{steps} loss {running / 50:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if step % 200 == 0 or step == steps:
            after(step)
    vae.requires_grad_(True)


def rate(step: int, crop_steps: int, full_steps: int) -> float:
    """The share of the peak rate: the first part of a cosine over the crops, then a line to zero."""
    if step < crop_steps:
        return warm_cosine(step, round(2.2 * crop_steps), 50)
    return warm_cosine(crop_steps, round(2.2 * crop_steps), 50) * (1 - (step - crop_steps) / full_steps)


def cropped(batch: Tensor, seed: int, step: int) -> Tensor:
    """A 32-pixel window of every picture of `batch`, the same one for all."""
    rng = stream(seed, "vae crop", step)
    top, left = (rng.randrange(side - CROP + 1) for side in batch.shape[2:])
    return batch[:, :, top : top + CROP, left : left + CROP]


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak rate at `step` of `steps`: a line up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return float(0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))
