"""The starter model from nothing: `python -m starter.make_model` pretrains it, `--random` writes untrained weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from starter.networks import STARTER, TINY, Size, build_networks, save_pipeline

SIZES = {"starter": STARTER, "tiny": TINY}


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


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("starter/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="untrained weights, in a second")
    parser.add_argument("--size", choices=sorted(SIZES), default="starter")
    arguments = parser.parse_args()
    if arguments.random:
        random_model(arguments.out, seed=arguments.seed, size=arguments.size)


if __name__ == "__main__":
    main()
