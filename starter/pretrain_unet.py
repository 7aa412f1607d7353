"""Joint pretraining of the starter's UNet and text encoder on latents that were computed once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starter.networks import Networks
from starter.pretrain_vae import pixels, warm_cosine
from starter.tokenizer import MAX_TOKENS
from starter.world import SIZES, Scene, caption, draw, random_scene
from utils.seeding import stream, tensor_stream

EMPTY_SHARE = 0.1
SNR_GAMMA = 5.0
EMA_RATE = 0.998


@dataclass(frozen=True, slots=True)
class Shelf:
    """Drawings of one size: scenes, and their latents' means and standard deviations (N, 4, H/8, W/8), unscaled."""

    scenes: tuple[Scene, ...]
    mean: Tensor
    std: Tensor


@torch.no_grad()
def fill_shelves(vae: Any, *, seed: int, count: int, batch_size: int = 32) -> list[Shelf]:
    """`count` drawings of each size, encoded."""
    shelves = []
    for size in SIZES:
        scenes: list[Scene] = []
        means: list[Tensor] = []
        stds: list[Tensor] = []
        rng = stream(seed, "shelf", *size)
        while len(scenes) < count:
            block = [random_scene(rng, sizes=(size,)) for _ in range(batch_size)]
            posterior = vae.encode(pixels([draw(scene, rng) for scene in block])).latent_dist
            scenes += block
            means.append(posterior.mean)
            stds.append(posterior.std)
        shelves.append(Shelf(tuple(scenes), torch.cat(means), torch.cat(stds)))
        print(f"encoded {len(scenes)} drawings of {size[0]}x{size[1]}", flush=True)
    return shelves


def scaling_factor(shelves: list[Shelf]) -> float:
    """One over the standard deviation of the sampled latents, as `vae.config.scaling_factor` is meant."""
    second = torch.cat([(shelf.mean**2 + shelf.std**2).flatten() for shelf in shelves]).double().mean()
    first = torch.cat([shelf.mean.flatten() for shelf in shelves]).double().mean()
    return round(float((second - first**2) ** -0.5), 6)


def alphas_cumprod() -> Tensor:
    """The product of 1 - beta over SD 1's "scaled_linear" schedule: (1000,), fp32 from fp64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from: noisy latents, the noise in them, their timesteps and their token numbers."""

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    tokens: Tensor


def draw_batch(
    shelves: list[Shelf], tokenizer: Any, alphas: Tensor, *, scale: float, seed: int, step: int, count: int
) -> Batch:
    """The batch of `step`: one size, fresh phrasings, timesteps spread evenly over the schedule."""
    rng, chance = stream(seed, "unet", step), tensor_stream(seed, "unet noise", step)
    shelf = rng.choice(shelves)
    chosen = [rng.randrange(len(shelf.scenes)) for _ in range(count)]
    texts = ["" if rng.random() < EMPTY_SHARE else caption(shelf.scenes[i], rng) for i in chosen]
    latents = shelf.mean[chosen]
    latents = (latents + shelf.std[chosen] * torch.randn(latents.shape, generator=chance)) * scale
    noise = torch.randn(latents.shape, generator=chance)
    places = (torch.arange(count) + torch.rand(count, generator=chance)) / count
    timesteps = (places * len(alphas)).long().clamp(max=len(alphas) - 1)
    signal = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    return Batch(noisy, noise, timesteps, tokenize(tokenizer, texts))


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """(B, 77) token numbers, cut and padded as every Stable Diffusion program does."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return torch.as_tensor(tokens.input_ids)


def unet_loss(networks: Networks, batch: Batch, weights: Tensor) -> Tensor:
    """Weighted mean squared error of the predicted noise (min-SNR, arXiv 2303.09556)."""
    context = networks.text_encoder(batch.tokens).last_hidden_state
    predicted: Tensor = networks.unet(batch.noisy, batch.timesteps, context).sample
    per_image = (predicted - batch.noise).square().mean(dim=(1, 2, 3))
    return (weights[batch.timesteps] * per_image).mean()


class Average:
    """Exponential moving average of the weights of both trained networks."""

    def __init__(self, networks: Networks) -> None:
        self.live = [p for part in (networks.unet, networks.text_encoder) for p in part.parameters()]
        self.kept = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live weights; quickly at first, so that the random start is forgotten."""
        rate = min(EMA_RATE, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.kept, self.live, 1 - rate)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; a second call undoes it."""
        for live, kept in zip(self.live, self.kept, strict=True):
            live.data, kept.data = kept.data.clone(), live.data.clone()


def train_unet(
    networks: Networks,
    tokenizer: Any,
    shelves: list[Shelf],
    *,
    scale: float,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    minutes: float | None,
    after: Callable[[int], None],
) -> None:
    """Train UNet and text encoder in place; `after(step)` is called every 500 steps, with the averaged weights in.

    AdamW, 200 steps of warmup, a cosine to zero over `steps`, or over `minutes` of wall time if those end first (the
    weights then depend on the machine's speed as well). Ends with the averaged weights in place.
    """
    alphas = alphas_cumprod()
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=SNR_GAMMA) / snr
    parameters = [*networks.unet.parameters(), *networks.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = Average(networks)
    started = time.monotonic()
    networks.unet.train(), networks.text_encoder.train()
    running = 0.0
    for step in range(1, steps + 1):
        done = step / steps if minutes is None else max(step / steps, (time.monotonic() - started) / 60 / minutes)
        last = done >= 1
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 200, warm_cosine(round(1000 * min(done, 1)), 1000, 0))
        batch = draw_batch(shelves, tokenizer, alphas, scale=scale, seed=seed, step=step, count=batch_size)
        loss = unet_loss(networks, batch, weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        average.update(step)
        running += loss.item()
        if step % 50 == 0:
            print(f"unet {step}/{steps} loss {running / 50:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if step % 500 == 0 or last:
            average.swap()
            after(step)
        if last:
            return
        if step % 500 == 0:
            average.swap()


def save_part(path: Path, part: Any) -> None:
    """Full-precision weights, between the stages of the pretraining."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in part.state_dict().items()}, path)
