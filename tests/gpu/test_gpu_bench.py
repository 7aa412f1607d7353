"""The benchmark of updates runs, and counts what it says it counts."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench.gpu import main


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")],
        ),
    ],
)
def test_a_toy_is_measured(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--device", device, "--batch", "1", "2", "--updates", "2"])
    result = json.loads(capsys.readouterr().out)
    cases = {(case["batch"], case["latents"]): case for case in result["cases"]}
    assert set(cases) == {(1, "on line"), (1, "cached"), (2, "on line"), (2, "cached")}
    assert result["optimizer"] == {"unet": "adamw", "text_encoder": "adamw"}
    for case in cases.values():
        assert case["images_per_second"] > 0
        assert case["share_of_matmul_rate"] > 0
        assert case["skipped_updates"] == 0
    counted = {key: case["tflop_per_image_counted"] for key, case in cases.items()}
    assert counted[1, "on line"] > counted[1, "cached"], "the VAE costs something"
    assert counted[1, "cached"] == counted[2, "cached"], "per image"
