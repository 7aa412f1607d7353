"""What watching costs, beside the update it watches, on the tiny model: `python -m tests.bench.watching`."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from utils.ledger import Ledger
from utils.meter import Meter
from utils.tracking import Tracker

LIMIT = 0.03
LOG_STEP = 25


def update_seconds(folder: Path, updates: int) -> float:
    """The median time of a whole update of the tiny model, batch 4 at 64 pixels, with AdamW."""
    from starter.make_model import random_model
    from utils.models import encode_text, load_models, tokenize

    models = load_models(random_model(folder / "model"))
    networks = [models.unet.requires_grad_(True), models.text_encoder.requires_grad_(True)]
    optimizer = torch.optim.AdamW([p for net in networks for p in net.parameters()], lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    timesteps = torch.arange(4) * 250
    tokens = tokenize(models, ["a red circle"] * 4)
    taken = []
    for _ in range(updates):
        start = time.perf_counter()
        context = encode_text(models.text_encoder, tokens, 0)
        answer = models.unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        (answer - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def watching_seconds(folder: Path, updates: int) -> float:
    """The median over logs of the time that meter, ledger and tracker take for an update."""
    ledger, meter, tracker = Ledger(), Meter(), Tracker(folder)
    losses, timesteps = torch.rand(4, generator=torch.Generator().manual_seed(0)), torch.arange(4) * 250
    values = {f"group/tag {number}": 0.5 for number in range(12)}
    taken = []
    for log in range(updates // LOG_STEP):
        start = time.perf_counter()
        for number in range(LOG_STEP):
            meter.add(losses.sum(), 4)
            ledger.add([f"image {(number * 4 + k) % 500}" for k in range(4)], losses, timesteps)
        ledger.collect()
        tracker.scalars(log, values | {"loss/log_step": meter.read().loss})
        taken.append((time.perf_counter() - start) / LOG_STEP)
    return statistics.median(taken[1:])


def main() -> None:
    """Print both and their ratio; exit 1 when it is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        update = update_seconds(Path(scratch), options.updates)
        watching = watching_seconds(Path(scratch), 40 * LOG_STEP)
    share = watching / update
    print(f"update {update * 1e3:.2f} ms, watching {watching * 1e3:.3f} ms an update: {share:.2%} (limit {LIMIT:.0%})")
    raise SystemExit(share > LIMIT)


if __name__ == "__main__":
    main()
