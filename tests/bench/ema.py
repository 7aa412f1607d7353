"""An EMA update of an SD 1.5 UNet on the CPU, beside a plain copy of as many bytes: `python -m tests.bench.ema`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from optimizer.ema import Ema

LIMIT = 1.5


def unet_shapes() -> list[tuple[str, torch.Size]]:
    """Names and shapes of the weights of the SD 1.5 UNet, 860 million numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    return [(name, parameter.shape) for name, parameter in unet.named_parameters()]


def seconds(work: Callable[[], object], times: int) -> list[float]:
    """How long each of `times` runs of `work` took, after one that does not count."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Measure both in turns and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(shape).uniform_(-1, 1, generator=generator) for name, shape in unet_shapes()}
    numbers = sum(weight.numel() for weight in weights.values())
    parts: dict[str, dict[str, Tensor]] = {"unet": weights}
    ema = Ema(parts, decay=0.999, interval=1)
    before = torch.cat([t.flatten()[:1] for t in ema.tensors("unet").values()])
    for weight in weights.values():
        weight.add_(0.5)
    moved = seconds(lambda: ema.update(1, parts), options.times)
    assert not torch.equal(before, torch.cat([t.flatten()[:1] for t in ema.tensors("unet").values()]))
    averages = list(ema.tensors("unet").values())

    def copy() -> None:
        for average, weight in zip(averages, weights.values(), strict=True):
            average.copy_(weight)

    copied = seconds(copy, options.times)
    update, plain = statistics.median(moved), statistics.median(copied)
    # A copy reads one and writes one; the update reads both and writes one.
    floor = 1.5 * plain
    print(f"{numbers / 1e6:.0f} M numbers, {numbers * 4 / 2**30:.2f} GiB fp32, {options.threads} thread(s)")
    print(f"EMA update  {update:.3f} s  ({min(moved):.3f} .. {max(moved):.3f})")
    print(f"plain copy  {plain:.3f} s  ({min(copied):.3f} .. {max(copied):.3f})")
    print(f"update / copy {update / plain:.2f}; update / (reading both and writing one) {update / floor:.2f}")
    print(f"{'within' if update <= LIMIT * floor else 'OVER'} the limit of {LIMIT} times reading both and writing one")


if __name__ == "__main__":
    main()
