"""What samples are drawn of: the prompts of a .txt or .json file, read anew each time, or captions of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem, ProblemsError, UserError
from utils.logs import LOGGER
from utils.options import read_json_object
from utils.schema import option, read_values
from utils.seeding import random_seed, stream

CFGS = (7.0, 4.0, 1.01)
COMMENTS = ("doc", "documentation")
PAGE = "docs/watching.md"
MOST_CAPTIONS = 4
LEAST_SIDE, MOST_SIDE = 16, 4096
LATENT_STEP = 8

SCHEDULERS = ("ddim", "pndm", "ddpm", "lms", "euler", "euler_a", "kdpm2", "kdpm2_a")
SOLVERS = ("dpm++", "dpm++_2m", "dpm++_2s", "dpm++_sde", "dpm++_2m_sde")
KARRAS = ("lms_k", "euler_k", "kdpm2_k", "kdpm2_a_k", *(f"{name}_k" for name in SOLVERS))
SCHEDULER_NAMES = (*SCHEDULERS, *SOLVERS, *KARRAS)


@dataclass(frozen=True, slots=True)
class SampleFile:
    """The keys of a sample file."""

    resolution: int | None = option(None, "side of a square sample; not given: that of the training", low=64, high=2048)
    cfgs: Any = option(None, "guidance scales, a picture for each")
    batch_size: int = option(1, "samples of one size drawn together", low=1, high=64)
    scheduler: str = option("ddim", "how noise becomes a picture", choices=SCHEDULER_NAMES)
    num_inference_steps: int = option(30, "steps from noise to picture", low=1, high=1000)
    show_progress_bars: bool = option(False, "a bar for each sample on the console")
    generate_pretrain_samples: bool = option(True, "draw samples before the first update, too")
    generate_samples_every_n_steps: int | None = option(
        None, "updates between samples, in place of sample_steps", low=1
    )
    seed: int | None = option(
        None, "seed of the samples; -1: another one each time; not given: that of the run", low=-1
    )
    prompt_weights: bool = option(False, "(word:1.2) and [word] weigh words in prompts; never in captions of the data")
    samples: Any = option(None, "the list of samples")


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """The keys of one sample in the file."""

    prompt: str | None = option(None, "what to draw")
    negative_prompt: str = option("", "what to keep away from")
    seed: int | None = option(None, "seed of this sample; -1: another one each time", low=-1)
    size: Any = option(None, "[width, height] in pixels")
    aspect_ratio: float | None = option(None, "width / height, at the area of the resolution", low=0.125, high=8)
    random_caption: bool = option(False, "a caption of the data in place of the prompt")
    cfgs: Any = option(None, "guidance scales of this sample")


@dataclass(frozen=True, slots=True)
class SampleJob:
    """One sample: a picture for each guidance scale, from the same noise.

    Args:
        index: its place in the file, from 0; it numbers the picture's file and tag.
        seed: of the generator of its noise, as any Diffusers program takes it.
        weighted: the prompts are in the grammar of `utils.prompt_weights`.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    cfgs: tuple[float, ...]
    weighted: bool = False


@dataclass(frozen=True, slots=True)
class SampleSheet:
    """The samples that are due at one time, and how they are drawn."""

    jobs: tuple[SampleJob, ...]
    scheduler: str = "ddim"
    steps: int = 30
    batch_size: int = 1
    show_progress: bool = False


class SamplePlan:
    """The samples of a run. The file is read again whenever samples are due; a broken one keeps the last good one."""

    def __init__(
        self, path: str | None, *, every: int, resolution: int, step: int, seed: int, batch_size: int = 1
    ) -> None:
        """`path`: the file, `None` for no samples; one that is missing stands for captions of the data.

        `every`, `resolution`, `step` (of the buckets), `seed` and `batch_size` hold where the file says nothing.
        Raises `UserError` when the file is broken.
        """
        self._path = None if path is None else Path(path)
        self._every, self._resolution, self._step, self._seed = every, resolution, step, seed
        self._batch_size = batch_size
        self._told = ""
        self._values, self._entries = self._read()
        if self._path is not None and not self._path.exists():
            LOGGER.info("there is no %s, so samples are drawn of captions of the data", self._path)

    @property
    def any(self) -> bool:
        """Whether there is anything to draw at all."""
        return self._path is not None

    def due(self, update: int, *, finished: bool = False) -> bool:
        """Whether samples are due after `update`; 0 is before the first, and those of the `finished` run always are."""
        if self._path is None:
            return False
        if finished:
            return True
        if update == 0:
            return bool(self._values.generate_pretrain_samples)
        every = self._values.generate_samples_every_n_steps
        return update % (self._every if every is None else every) == 0

    def sheet(self, update: int, captions: Sequence[str]) -> SampleSheet:
        """The samples after `update`; `captions` of the update stand in where the file has no prompt."""
        try:
            self._values, self._entries = self._read()
            self._told = ""
        except UserError as error:
            if str(error) != self._told:
                self._told = str(error)
                LOGGER.warning("the sample file is broken, so its last good form is used; " + self._told)
        values = self._values
        # A caption that was dropped for its visit says nothing; those that were heard are what the user means.
        captions = [text for text in captions if text.strip()] or captions
        entries = self._entries or tuple(SampleEntry(prompt=text) for text in captions[:MOST_CAPTIONS])
        return SampleSheet(
            jobs=tuple(self._job(index, entry, update, captions) for index, entry in enumerate(entries)),
            scheduler=values.scheduler,
            steps=values.num_inference_steps,
            batch_size=values.batch_size,
            show_progress=values.show_progress_bars,
        )

    def _job(self, index: int, entry: SampleEntry, update: int, captions: Sequence[str]) -> SampleJob:
        prompt, from_data = entry.prompt, entry.random_caption or entry.prompt is None
        if from_data and captions:
            prompt = stream(self._seed, "sample caption", update, index).choice(list(captions))
        given = [seed for seed in (entry.seed, self._values.seed) if seed is not None]
        seed = given[0] if given else self._seed
        resolution = self._resolution if self._values.resolution is None else self._values.resolution
        width, height = sample_size(entry, resolution, self._step)
        return SampleJob(
            index=index,
            prompt="" if prompt is None else prompt,
            negative_prompt=entry.negative_prompt,
            seed=random_seed() if seed == -1 else seed,
            width=width,
            height=height,
            cfgs=_first_given(entry.cfgs, self._values.cfgs, CFGS),
            weighted=self._values.prompt_weights and not from_data,
        )

    def _read(self) -> tuple[SampleFile, tuple[SampleEntry, ...]]:
        if self._path is None:
            return SampleFile(batch_size=self._batch_size), ()
        return _read_samples(self._path, self._batch_size)


def check_samples(path: str | None) -> None:
    """Raise `ProblemsError` with everything that is wrong with a sample file; one that is missing is not wrong."""
    if path is not None:
        _read_samples(Path(path), 1)


def _read_samples(path: Path, batch_size: int) -> tuple[SampleFile, tuple[SampleEntry, ...]]:
    if not os.path.exists(path):  # noqa: PTH110  pathlib raises for a name that is too long
        return SampleFile(batch_size=batch_size), ()
    if path.suffix.lower() == ".json":
        return read_sample_json(path, batch_size)
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return SampleFile(batch_size=batch_size), tuple(SampleEntry(prompt=line) for line in lines if line)


def read_sample_json(path: Path, batch_size: int) -> tuple[SampleFile, tuple[SampleEntry, ...]]:
    """The settings and samples of a JSON file.

    Raises `ProblemsError` with everything that is wrong with it.
    """
    where = str(path)
    raw = {key: value for key, value in read_json_object(path).items() if key not in COMMENTS}
    values, problems = read_values(SampleFile, raw, where, PAGE)
    values["cfgs"], wrong = _cfgs(values.get("cfgs"), where, "cfgs")
    problems += wrong
    entries = []
    listed = values.pop("samples", None)
    if listed is not None and not isinstance(listed, list):
        problems.append(Problem(where, "samples", listed, "must be a list of samples: [{ ... }, ...]"))
        listed = None
    for index, item in enumerate(listed or []):
        entry, wrong = _entry(item, where, f"samples[{index}]")
        entries.append(entry)
        problems += wrong
    if problems:
        raise ProblemsError(problems)
    values.setdefault("batch_size", batch_size)
    return SampleFile(**values), tuple(entries)


def _entry(item: Any, where: str, key: str) -> tuple[SampleEntry, list[Problem]]:
    if isinstance(item, str):
        return SampleEntry(prompt=item), []
    if not isinstance(item, Mapping):
        return SampleEntry(), [Problem(where, key, item, 'must be an object: { "prompt": ... }')]
    values, problems = read_values(SampleEntry, item, f"{where}: {key}", PAGE)
    values["cfgs"], wrong = _cfgs(values.get("cfgs"), where, f"{key}.cfgs")
    problems += wrong
    size = values.get("size")
    if size is not None and not _is_size(size):
        remedy = f"must be [width, height], each {LEAST_SIDE} to {MOST_SIDE} pixels"
        problems.append(Problem(where, f"{key}.size", size, remedy))
    if size is not None and "aspect_ratio" in values:
        problems.append(Problem(where, f"{key}.aspect_ratio", None, "and size both set the shape; drop one"))
    return SampleEntry(**values), problems


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and LEAST_SIDE <= side <= MOST_SIDE for side in value)
    )


def _cfgs(value: Any, where: str, key: str) -> tuple[tuple[float, ...] | None, list[Problem]]:
    if value is None:
        return None, []
    listed = value if isinstance(value, list) else [value]
    good = all(isinstance(cfg, int | float) and not isinstance(cfg, bool) and 0 <= cfg <= 100 for cfg in listed)
    if not listed or not good:
        return None, [Problem(where, key, value, "must be a list of numbers from 0 to 100")]
    return tuple(float(cfg) for cfg in listed), []


def _first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def sample_size(entry: SampleEntry, resolution: int, step: int) -> tuple[int, int]:
    """Width and height of a sample: as given (in whole latents), or of the aspect ratio at the area of `resolution`."""
    if entry.size is not None:
        width, height = (side // LATENT_STEP * LATENT_STEP for side in entry.size)
        return width, height
    if entry.aspect_ratio is None:
        side = max(LATENT_STEP, resolution // LATENT_STEP * LATENT_STEP)
        return side, side
    return _shape_at(entry.aspect_ratio, resolution, step)


def _shape_at(ratio: float, resolution: int, step: int) -> tuple[int, int]:
    """The sides in whole steps, at most `resolution` squared in area, that come nearest to `ratio` and to that area."""
    area = resolution * resolution

    def badness(shape: tuple[int, int]) -> float:
        width, height = shape
        return abs(math.log(width / height / ratio)) + 0.5 * math.log(area / (width * height))

    sides = range(step, min(MOST_SIDE, area // step) + 1, step)
    near = {(side, other) for side in sides for other in _around(side / ratio, step)}
    near |= {(other, side) for side in sides for other in _around(side * ratio, step)}
    return min(sorted(shape for shape in near if shape[0] * shape[1] <= area), key=badness)


def _around(length: float, step: int) -> tuple[int, int]:
    below = max(1, math.floor(length / step))
    return below * step, (below + 1) * step


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = f"is not UTF-8 text (byte {error.start}); save the prompts as UTF-8"
    except OSError as error:
        remedy = f"cannot be read: {error.strerror}"
    raise ProblemsError([Problem(str(path), "", None, remedy)])
