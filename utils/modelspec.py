"""What a single file says about itself: Stability AI's model metadata standard, version 1.0.0."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from utils.model_files import ModelFiles

# https://github.com/Stability-AI/ModelSpec
VERSION = "1.0.0"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
MAX_PREVIEW_BYTES = 128 << 10
# Options that hold where things lie, or whose words may: they say more about the user's machine than about the model.
PRIVATE = (
    *("path", "dir", "logdir", "root", "ckpt", "config", "prompts", "plugins"),
    *("resume", "model", "gpuid", "device"),
)
SECRET = ("token", "key", "secret", "password")


def modelspec(
    files: ModelFiles,
    *,
    title: str,
    date: datetime,
    resolution: int,
    trigger_words: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    preview: bytes | None = None,
) -> dict[str, str]:
    """Metadata for the header of a single file; the hash of the tensors is added when it is written.

    Args:
        files: configurations of the model, marked as for the export.
        title: the name users see.
        date: when the model was made, with a time zone.
        resolution: side of the square the model was trained at, in pixels.
        trigger_words: words that call up what was learned.
        options: the run's options; those with paths and secrets are left out.
        preview: a JPEG of at most 128 KiB, best 256 x 256; a larger one is left out.
    """
    found = {
        "modelspec.sai_model_spec": VERSION,
        "modelspec.architecture": architecture(files),
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": date.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if files.prediction_type == "v_prediction" else "epsilon",
    }
    if trigger_words:
        words = ", ".join(trigger_words)
        found |= {"modelspec.trigger_phrase": words, "modelspec.usage_hint": f"Trigger words: {words}"}
    if preview is not None and preview[:3] == b"\xff\xd8\xff" and len(preview) <= MAX_PREVIEW_BYTES:
        found["modelspec.thumbnail"] = f"data:image/jpeg;base64,{base64.b64encode(preview).decode('ascii')}"
    if options is not None:
        found["emulsion.options"] = json.dumps(public_options(options), sort_keys=True, ensure_ascii=True)
    return found


def architecture(files: ModelFiles) -> str:
    """The standard's name for the kind of model: SD 2 has two, as v-prediction takes other code to run."""
    if files.kind == "sd1":
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if files.prediction_type == "v_prediction" else "stable-diffusion-v2-512"


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that anyone may read: numbers, choices and words that are no paths, names or secrets."""
    return {key: value for key, value in options.items() if not _private(key) and _harmless(value)}


def _private(key: str) -> bool:
    words = key.lower().split("_")
    return any(word in PRIVATE for word in words) or any(secret in key.lower() for secret in SECRET)


def _harmless(value: object) -> bool:
    if isinstance(value, str):
        return not any(sign in value for sign in "/\\~")
    return value is None or isinstance(value, bool | int | float)
