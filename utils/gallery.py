"""Where samples are hung: strips stamped with their guidance in `samples/`, a text beside each, and TensorBoard."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from utils.borrow import weights_swapped
from utils.errors import printable
from utils.logs import LOGGER
from utils.prompts import SampleJob, SamplePlan, SampleSheet
from utils.sampling import sample_pictures
from utils.tracking import Tracker, sample_tag

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from utils.models import Models

# Tensors by network ("unet", "text_encoder") and parameter.
Weights = Mapping[str, Mapping[str, "Tensor"]]
LIVE: Mapping[str, Weights] = {"": {}}
NAME_BYTES = 120
EXIF_BLOCK, USER_COMMENT = 0x8769, 0x9286


@dataclass(slots=True)
class Gallery:
    """Draws samples when they are due, writes them down, and never ends a run.

    Args:
        folder: `samples/` of the run folder.
        clip_skip, zero_terminal_snr: as the training has them.
        autocast: makes the context in which the networks compute, as in training.
    """

    models: Models
    plan: SamplePlan
    tracker: Tracker
    folder: Path
    clip_skip: int = 0
    zero_terminal_snr: bool = False
    device: torch.device | str = "cpu"
    autocast: Callable[[], AbstractContextManager[Any]] | None = None

    def draw(self, update: int, captions: Sequence[str], versions: Mapping[str, Weights] = LIVE) -> list[Path]:
        """The pictures written after `update`, those of the first version first.

        `captions`: of the update, for samples without a prompt. `versions`: the weights to draw with, by a label that
        goes into the names ("ema"; "" for the trained ones); `{}` for networks as they are. What fails is logged.
        """
        try:
            sheet = self.plan.sheet(update, captions)
            return [
                path for label, weights in versions.items() for path in self._version(update, sheet, label, weights)
            ]
        except Exception as error:  # noqa: BLE001  a sample that fails must not end a run
            _tell(update, error)
            return []

    def rehearse(self, update: int, captions: Sequence[str]) -> SampleJob | None:
        """Draw the largest of the samples in two steps and throw it away: which it was, `None` without samples.

        Raises whatever the drawing raises.
        """
        sheet = self.plan.sheet(update, captions)
        if not self.plan.any or not sheet.jobs:
            return None
        largest = max(sheet.jobs, key=lambda job: job.width * job.height)
        self._sample(replace(sheet, jobs=(largest,), steps=2, show_progress=False))
        return largest

    def _version(self, update: int, sheet: SampleSheet, label: str, weights: Weights) -> list[Path]:
        written = []
        with ExitStack() as stack:
            for name, tensors in weights.items():
                stack.enter_context(weights_swapped(getattr(self.models, name), tensors))
            for job, pictures in self._pictures(update, sheet):
                written.append(self._hang(update, job, sheet, strip(pictures, job.cfgs), label))
        return written

    def _pictures(self, update: int, sheet: SampleSheet) -> list[tuple[SampleJob, list[Image.Image]]]:
        """All jobs together, or, if that fails, those that succeed alone."""
        try:
            return list(zip(sheet.jobs, self._sample(sheet), strict=True))
        except Exception as error:  # memory, most likely: one by one takes least of it
            if len(sheet.jobs) < 2:
                raise
            LOGGER.info("samples together failed (%s), so they are drawn one by one", str(error))
        drawn = []
        for job in sheet.jobs:
            try:
                (pictures,) = self._sample(replace(sheet, jobs=(job,)))
                drawn.append((job, pictures))
            except Exception as error:  # noqa: BLE001  the others still count
                _tell(update, error, job.prompt)
        return drawn

    def _sample(self, sheet: SampleSheet) -> list[list[Image.Image]]:
        return sample_pictures(
            self.models,
            sheet,
            clip_skip=self.clip_skip,
            zero_terminal_snr=self.zero_terminal_snr,
            device=self.device,
            autocast=None if self.autocast is None else self.autocast(),
        )

    def _hang(self, update: int, job: SampleJob, sheet: SampleSheet, picture: Image.Image, label: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{file_stem(update, job, label)}.jpg"
        path.write_bytes(jpeg_with_settings(picture, parameters(job, sheet)))
        text = description(update, job, sheet, label, self.clip_skip, self.zero_terminal_snr)
        path.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        self.tracker.image(sample_tag(job.index, f"{label} {job.prompt}"), picture, update)
        return path


def _tell(update: int, error: Exception, prompt: str | None = None) -> None:
    what = "the samples" if prompt is None else f"the sample {printable(prompt)[:60]!r}"
    LOGGER.warning("%s after update %s failed: %s: %s", what, update, type(error).__name__, str(error), exc_info=True)


def file_stem(update: int, job: SampleJob, label: str = "") -> str:
    """`gs{S:05}-{i:03}-{ema}{words of the prompt}`, short enough and safe for every file system."""
    head = f"gs{update:05}-{job.index:03}-" + (f"{label}-" if label else "")
    return head + file_words(job.prompt, NAME_BYTES - len(head))


def file_words(text: str, limit: int) -> str:
    """The letters and digits of `text` joined by `-`, at most `limit` bytes: file names are counted in bytes."""
    encoding = sys.getfilesystemencoding()
    known = text.encode(encoding, "ignore").decode(encoding, "ignore")
    words = "".join(c if c.isalnum() else " " for c in known).split()
    cut = "-".join(words).encode(encoding)[:limit].decode(encoding, "ignore")
    return cut.strip("-") or "empty"


def strip(pictures: Sequence[Image.Image], cfgs: Sequence[float]) -> Image.Image:
    """`pictures` of one size side by side, the guidance scale of each in a band below it."""
    width, height = pictures[0].size
    size = max(9, height // 24)
    band = size + size // 2
    whole = Image.new("RGB", (width * len(pictures), height + band), "black")
    pen = ImageDraw.Draw(whole)
    font = ImageFont.load_default(size)
    for place, (picture, cfg) in enumerate(zip(pictures, cfgs, strict=True)):
        whole.paste(picture, (place * width, 0))
        pen.text((place * width + size // 3, height + size // 8), f"cfg {cfg:g}", fill="white", font=font)
    return whole


def parameters(job: SampleJob, sheet: SampleSheet) -> str:
    """The settings of a sample in the form that web UIs write into pictures, and read from them."""
    negative = f"\nNegative prompt: {job.negative_prompt}" if job.negative_prompt else ""
    scales = "/".join(f"{cfg:g}" for cfg in job.cfgs)
    return (
        f"{job.prompt}{negative}\nSteps: {sheet.steps}, Sampler: {sheet.scheduler}, CFG scale: {scales}, "
        f"Seed: {job.seed}, Size: {job.width}x{job.height}"
    )


def description(
    update: int, job: SampleJob, sheet: SampleSheet, label: str, clip_skip: int, zero_terminal_snr: bool
) -> str:
    """The text beside a picture, a setting a line."""
    rows = {
        "prompt": job.prompt,
        "negative prompt": job.negative_prompt,
        "seed": job.seed,
        "size": f"{job.width} x {job.height}",
        "guidance": ", ".join(f"{cfg:g}" for cfg in job.cfgs),
        "scheduler": sheet.scheduler,
        "steps": sheet.steps,
        "clip_skip": clip_skip,
        "zero terminal SNR": "yes" if zero_terminal_snr else "no",
        "prompt weights": "yes" if job.weighted else "no",
        "weights": label or "plain",
        "update": update,
    }
    return "".join(f"{name}: {printable(value)}\n" for name, value in rows.items())


def jpeg_with_settings(picture: Image.Image, settings: str) -> bytes:
    """`picture` as a JPEG that carries `settings` as comment and in EXIF, where web UIs look for them."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_BLOCK)[USER_COMMENT] = b"UNICODE\0" + settings.encode("utf-16-be", "replace")
    buffer = io.BytesIO()
    comment = settings.encode("utf-8", "backslashreplace")[:60_000]
    picture.save(buffer, "JPEG", quality=95, subsampling=0, comment=comment, exif=exif)
    return buffer.getvalue()
