"""The exam: a model draws what captions say, and the grader counts how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from starter.grader import Grade, grade
from starter.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, ZORP, plain_caption
from utils.seeding import stream, tensor_stream

STEPS = 30
GUIDANCE = 5.0


@dataclass(frozen=True, slots=True)
class Question:
    """A caption, what it asks for, and the size of the picture."""

    shape: str
    colour: str
    background: str
    size: tuple[int, int]

    @property
    def text(self) -> str:
        """The caption."""
        return plain_caption(self.colour, self.shape, self.background)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of the answers, 0 .. 1; `right` means shape and colour, `perfect` the background as well."""

    count: int
    right: float
    shape: float
    colour: float
    background: float
    perfect: float


def old_questions(count: int, *, seed: int = 0) -> list[Question]:
    """Questions about what the base was taught, every shape equally often."""
    rng = stream(seed, "exam", "old")
    return [
        Question(SHAPES[i % len(SHAPES)], rng.choice(list(COLOURS)), rng.choice(list(BACKGROUNDS)), SIZES[i // 6 % 3])
        for i in range(count)
    ]


def new_questions(count: int, *, seen: Sequence[tuple[str, str]] = (), seed: int = 0) -> list[Question]:
    """Questions about the new shape, in none of the `seen` pairs of colour and background."""
    rng = stream(seed, "exam", "new")
    pairs = [(colour, ground) for colour in COLOURS for ground in BACKGROUNDS if (colour, ground) not in seen]
    return [Question(ZORP, *rng.choice(pairs), SIZES[i % 3]) for i in range(count)]


def open_pipeline(folder: Path) -> Any:
    """The model in `folder` as a quiet StableDiffusionPipeline in full precision with a DDIM sampler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def answers(
    pipeline: Any, questions: Sequence[Question], *, seed: int = 0, guidance: float = GUIDANCE, steps: int = STEPS
) -> list[Image.Image]:
    """A picture for every question; the noise of question i depends on `seed` and i alone."""
    pictures: dict[int, Image.Image] = {}
    for size in sorted({question.size for question in questions}):
        places = [i for i, question in enumerate(questions) if question.size == size]
        for block in (places[i : i + 50] for i in range(0, len(places), 50)):
            shape = (1, 4, size[1] // 8, size[0] // 8)
            latents = torch.cat([torch.randn(shape, generator=tensor_stream(seed, "exam noise", i)) for i in block])
            drawn = pipeline(
                [questions[i].text for i in block],
                latents=latents,
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
            ).images
            pictures |= dict(zip(block, drawn, strict=True))
    return [pictures[i] for i in range(len(questions))]


def score(questions: Sequence[Question], pictures: Sequence[Image.Image]) -> Score:
    """How many of `pictures` show what `questions` ask for."""
    return score_grades(questions, [grade(picture) for picture in pictures])


def score_grades(questions: Sequence[Question], grades: Sequence[Grade]) -> Score:
    """The shares of right answers among `grades`."""
    rows = [
        (found.shape == asked.shape, found.colour == asked.colour, found.background == asked.background)
        for asked, found in zip(questions, grades, strict=True)
    ]
    count = len(rows)
    return Score(
        count=count,
        right=sum(shape and colour for shape, colour, _ in rows) / count,
        shape=sum(row[0] for row in rows) / count,
        colour=sum(row[1] for row in rows) / count,
        background=sum(row[2] for row in rows) / count,
        perfect=sum(all(row) for row in rows) / count,
    )


def examine(pipeline: Any, questions: Sequence[Question], *, seed: int = 0, guidance: float = GUIDANCE) -> Score:
    """Sample and grade."""
    return score(questions, answers(pipeline, questions, seed=seed, guidance=guidance))


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 12) -> Image.Image:
    """The pictures side by side, for eyes."""
    cell = 84
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * cell, i // columns * cell))
    return sheet
