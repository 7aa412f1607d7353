"""Words that weigh more and less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from starter.make_model import random_model
from utils.models import Models, encode_text, load_models, tokenize
from utils.prompt_weights import parse_weights, weigh, weighted_tokens
from utils.prompts import SampleJob, SampleSheet
from utils.sampling import sample_pictures


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("a (red: .5 )cat", [("a ", 1.0), ("red", 0.5), ("cat", 1.0)]),
        ("[a [b]]", [("a ", 1 / 1.1), ("b", 1 / 1.1**2)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        (r"a \(real\) bracket \\", [("a (real) bracket \\", 1.0)]),
        ("at 12:30, x:)", [("at 12:30, x:)", 1.0)]),
        ("a) b] (c", [("a) b] ", 1.0), ("c", 1.1)]),
        ("(a]:1.5)", [("a]", 1.5)]),
        ("", []),
    ],
)
def test_grammar(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return load_models(random_model(tmp_path_factory.mktemp("model") / "sd"))


def test_without_weights_the_tokens_are_those_of_the_training(models: Models) -> None:
    for prompt in ("a red circle, blue square", "", "word " * 100):
        tokens, weights = weighted_tokens(models, prompt)
        assert torch.equal(tokens, tokenize(models, [prompt]))
        assert torch.equal(weights, torch.ones(1, models.max_tokens))


def test_weights_fall_on_their_words_and_keep_the_mean(models: Models) -> None:
    tokens, weights = weighted_tokens(models, "a (red:1.5) circle")
    plain = tokenize(models, ["a red circle"])
    assert torch.equal(tokens, plain)
    red = weighted_tokens(models, "a (red:1.5)")[1] != 1
    assert torch.equal(weights != 1, red)
    with torch.no_grad():
        embedding = encode_text(models.text_encoder, tokens, 0)
    weighed = weigh(embedding, weights)
    assert weighed.mean() == pytest.approx(embedding.mean().item(), rel=1e-4)
    ratio = (weighed / embedding)[0].mean(1)
    assert (ratio[red[0]] / ratio[0]).tolist() == pytest.approx([1.5] * int(red.sum()), rel=1e-4)


def test_only_where_the_file_asks_for_it(models: Models, tmp_path: Path) -> None:
    def draw(prompt: str, weighted: bool) -> object:
        job = SampleJob(0, prompt, "", 1, 16, 16, (3.0,), weighted)
        return np.asarray(sample_pictures(models, SampleSheet((job,), steps=2))[0][0]).tolist()

    assert draw("a (red:3) circle", True) != draw("a red circle", True)
    assert draw("a red circle", True) == draw("a red circle", False)
    assert draw("a (red:3) circle", False) != draw("a (red:3) circle", True)
