"""How fast the data is found and decoded, beside Pillow in the same run: `python -m tests.bench.data [--cold]`."""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.buckets import compute_buckets, nearest_bucket
from data.dataset import read_training_set
from data.headers import read_header
from data.item import Bucket, Caption, Item
from data.pixels import load_pixels
from data.plan import plan_epoch
from data.sources import find_data
from tests.photos import cut, photographs
from utils.config import DataOptions


def seconds(work: Callable[[], object], times: int, before: Callable[[], object] | None = None) -> float:
    """The median time of `times` runs of `work`."""
    taken = []
    for _ in range(times):
        if before is not None:
            before()
        gc.collect()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def encoded(image: Image.Image, form: str) -> bytes:
    """The picture as a camera or a program would write it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0110] = 6, "Maker", "Model of a camera"
    target = BytesIO()
    image.save(target, form, exif=exif, quality=88)
    return target.getvalue()


def make_folder(root: Path, count: int) -> None:
    """`count` captioned pictures: seven JPEGs to two WEBPs and one PNG, all with EXIF, times in the past."""
    chance = random.Random(0)
    small = [cut(image, (480, 320), 0.5) for image, _ in photographs().values()]
    files = [(".jpg", encoded(i, "JPEG")) for i in small] + [(".webp", encoded(i, "WEBP")) for i in small[:2]]
    files.append((".png", encoded(small[0], "PNG")))
    for number in range(count):
        folder = root / f"set{number // 1000:03}"
        folder.mkdir(exist_ok=True)
        suffix, content = chance.choice(files)
        content += number.to_bytes(4) * chance.randint(1, 5_000)  # no two alike, and few of equal length
        for path, data in (
            (folder / f"picture{number:06}{suffix}", content),
            (folder / f"picture{number:06}.txt", f"picture {number}, red, soft light, wide angle".encode()),
        ):
            path.write_bytes(data)
            os.utime(path, (1_600_000_000, 1_600_000_000 + number))


def forget(root: Path) -> None:
    """Ask the system to drop the files from its memory."""
    os.sync()
    for path in root.rglob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def stat_all(folder: Path) -> None:
    """What no start can do without: every name, size and time is asked for."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                stat_all(Path(entry.path))
            else:
                entry.stat()


def open_all(paths: Sequence[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            assert image.width


def bench_scan(count: int, *, cold: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        make_folder(root, count)
        paths = [item.path for item in find_data([root]).items]
        before = (lambda: forget(root)) if cold else None
        pillow = seconds(lambda: open_all(paths), 3, before)
        headers = seconds(lambda: [read_header(path) for path in paths], 3, before)
        first = seconds(lambda: find_data([root]), 3, before)
        find_data(str(root), index_kind="beside")
        second = seconds(lambda: find_data(str(root), index_kind="beside"), 3, before)
        limit = seconds(lambda: stat_all(root), 3, before)
    state = "cold" if cold else "warm"
    print(f"scan of {count:,} pictures with captions, {state} files")
    print(f"  Image.open loop   {pillow:7.3f} s")
    print(f"  headers only      {headers:7.3f} s")
    print(f"  first start       {first:7.3f} s   {pillow / first:5.1f} x as fast as the loop (target 1.5)")
    print(f"  second start      {second:7.3f} s   {first / second:5.1f} x as fast as the first")
    print(f"  scandir and stat  {limit:7.3f} s   the second start takes {second / limit:.2f} of it (target 1.5)")


def bench_check(count: int) -> None:
    """A start that decodes every picture, and the next one, which remembers."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        make_folder(root, count)
        options = DataOptions(data_root=str(root), resolution=512, data_index="beside", check_data=True)

        def start() -> None:
            read_training_set(options, seed=1, epochs=1, max_steps=None)

        first, second = seconds(start, 1), seconds(start, 3)
    print(f"start with check_data, {count:,} pictures of 480 x 320")
    print(f"  first {first:.2f} s, second {second:.3f} s: {first / second:.0f} x as fast (target 20)")


def plain(path: str, bucket: Bucket) -> torch.Tensor:
    """What a plain trainer does: decode all, crop the middle, Lanczos."""
    with Image.open(path) as image:
        whole = image.convert("RGB")
    return torch.from_numpy(np.array(cut_lanczos(whole, bucket)))


def cut_lanczos(image: Image.Image, bucket: Bucket) -> Image.Image:
    scale = min(image.width / bucket.width, image.height / bucket.height)
    width, height = round(bucket.width * scale), round(bucket.height * scale)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize(bucket, Image.Resampling.LANCZOS)


def bench_decode(name: str, form: str, size: tuple[int, int], target: float) -> None:
    image = cut(photographs()["astronaut"][0], size, 0.5)
    grain = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 1))
    image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "picture"
        target_file = BytesIO()
        image.save(target_file, form, quality=92)
        path.write_bytes(target_file.getvalue())
        item = Item("picture", str(path), *size, Caption(""))
        bucket = nearest_bucket(*size, compute_buckets(512, 64))
        chance = random.Random(0)
        ours = seconds(lambda: load_pixels(item, bucket, rng=chance, flip_p=0.5, crop_jitter=0.02), 9)
        theirs = seconds(lambda: plain(str(path), bucket), 5)
        got = load_pixels(item, bucket, rng=None, flip_p=0, crop_jitter=0).permute(1, 2, 0).float()
        with Image.open(path) as whole:
            full = torch.from_numpy(np.array(whole.convert("RGB"))).permute(2, 0, 1)
        box = cut_box(size, bucket)
        full = full[:, box[1] : box[3], box[0] : box[2]]
        resized = torch.nn.functional.interpolate(full[None], bucket[::-1], mode="bicubic", antialias=True)[0]
        error = (got - resized.permute(1, 2, 0).float()).square().mean().item()
    quality = "equal" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"
    print(
        f"{name}: {1 / ours:6.1f} images/s, Pillow at full size {1 / theirs:6.1f}, "
        f"{theirs / ours:4.1f} x (target {target}), against full decoding and the same resize: {quality}"
    )


def cut_box(size: tuple[int, int], bucket: Bucket) -> tuple[int, int, int, int]:
    scale = min(size[0] / bucket.width, size[1] / bucket.height)
    width, height = bucket.width * scale, bucket.height * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return round(left), round(top), round(left + width), round(top + height)


def bench_plan(count: int) -> None:
    buckets = compute_buckets(512, 64)
    chance = random.Random(0)
    items = [(Item(f"{i:06}", "", 1, 1, Caption("")), chance.choice(buckets)) for i in range(count)]
    taken = seconds(lambda: plan_epoch(items, batch_size=8, grad_accum=2, seed=1, epoch=0), 3)
    print(f"plan of {count:,} visits: {taken:.3f} s (target 1)")


def main() -> None:
    """Print the figures of docs/data.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--cold", action="store_true", help="files dropped from memory before each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench_scan(options.count, cold=options.cold)
    bench_check(2_000)
    bench_plan(100_000)
    bench_decode("12-megapixel JPEG", "JPEG", (4032, 3024), 3)
    bench_decode("1-megapixel PNG", "PNG", (1216, 832), 1)
    bench_decode("1-megapixel WEBP", "WEBP", (1216, 832), 1)


if __name__ == "__main__":
    main()
