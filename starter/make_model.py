"""The starter model from nothing: `python -m starter.make_model` pretrains it, `--random` writes untrained weights."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from starter.networks import STARTER, TINY, Size, build_networks, read_weights, save_pipeline
from starter.pretrain_unet import Shelf, fill_shelves, save_part, scaling_factor, train_unet
from starter.pretrain_vae import polish_decoder, train_vae
from starter.tokenizer import write_tokenizer

SIZES = {"starter": STARTER, "tiny": TINY}
SHELF = 3072  # drawings of each size


def random_model(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    size: Size | str = TINY,
    scaling_factor: float = 0.5,
) -> Path:
    """A complete Diffusers folder of untrained fp32 weights, a function of the arguments alone; returns `folder`.

    Raises `KeyError` for a name of `size` other than "starter" and "tiny".
    """
    chosen = SIZES[size] if isinstance(size, str) else size
    networks = build_networks(chosen, seed=seed)
    save_pipeline(folder, networks, dtype=torch.float32, prediction_type=prediction_type, scaling_factor=scaling_factor)
    return folder


def pretrain_autoencoder(work: Path, *, seed: int, crop_steps: int, full_steps: int) -> None:
    """The first stage: `work`/vae.safetensors."""
    vae = build_networks(STARTER, seed=seed).vae
    path = work / "vae.safetensors"
    train_vae(vae, seed=seed, crop_steps=crop_steps, full_steps=full_steps, after=lambda _: save_part(path, vae))


def sharpen(work: Path, *, seed: int, steps: int) -> None:
    """The stage after it: a better decoder for the same latents, in the same file."""
    from safetensors.torch import load_file

    vae = build_networks(STARTER, seed=seed).vae
    path = work / "vae.safetensors"
    vae.load_state_dict(load_file(path))
    polish_decoder(vae, seed=seed, steps=steps, after=lambda _: save_part(path, vae))


def pretrain_networks(
    work: Path,
    out: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    minutes: float | None,
    resume: bool,
) -> None:
    """The second stage: UNet and text encoder on the first stage's latents; every 500 steps `out` is written anew.

    `resume`: go on from the weights in `out` with a new schedule; another `seed` then gives new drawings and noise.
    """
    from safetensors.torch import load_file

    networks = build_networks(STARTER, seed=seed)
    networks.vae.load_state_dict(load_file(work / "vae.safetensors"))
    write_tokenizer(work / "tokenizer")
    shelves: list[Shelf] = fill_shelves(networks.vae, seed=seed, count=SHELF)
    scale = read_weights(out, networks) if resume else scaling_factor(shelves)
    print(f"scaling factor {scale}", flush=True)
    started = time.monotonic()

    def after(step: int) -> None:
        save_pipeline(out, networks, dtype=torch.float16, scaling_factor=scale)
        if step % 1000 == 0:
            print(json.dumps({"step": step, "seconds": round(time.monotonic() - started)} | _marks(out)), flush=True)

    train_unet(
        networks,
        _open_tokenizer(work / "tokenizer"),
        shelves,
        scale=scale,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        minutes=minutes,
        after=after,
    )


def _open_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def _marks(folder: Path) -> dict[str, float]:
    from starter.exam import examine, old_questions, open_pipeline

    return asdict(examine(open_pipeline(folder), old_questions(60)))


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("starter/model"))
    parser.add_argument("--work", type=Path, default=Path("starter/.work"), help="what the stages hand on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--random", action="store_true", help="untrained weights, in a second")
    parser.add_argument("--size", choices=sorted(SIZES), default="starter", help="with --random")
    parser.add_argument("--stage", choices=("all", "vae", "decoder", "unet"), default="all")
    parser.add_argument("--crop-steps", type=int, default=2500)
    parser.add_argument("--full-steps", type=int, default=1200)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2650)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--minutes", type=float, help="wall time of the second stage, if --steps take longer")
    parser.add_argument("--resume", action="store_true", help="second stage: go on from the weights in --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.random:
        random_model(options.out, seed=options.seed, size=options.size)
        return
    if options.stage in ("all", "vae"):
        pretrain_autoencoder(
            options.work, seed=options.seed, crop_steps=options.crop_steps, full_steps=options.full_steps
        )
    if options.stage in ("all", "decoder"):
        sharpen(options.work, seed=options.seed, steps=options.decoder_steps)
    if options.stage in ("all", "unet"):
        pretrain_networks(
            options.work,
            options.out,
            seed=options.seed,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            minutes=options.minutes,
            resume=options.resume,
        )


if __name__ == "__main__":
    main()
