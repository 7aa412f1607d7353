"""The manifest of a folder: sizes and hashes that prove that nothing is missing or changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError, printable
from utils.files import sync_folder, sync_tree, walk

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MANIFEST_LIMIT = 16 * 2**20
CHUNK = 4 * 2**20


class DamagedError(UserError):
    """A file or folder is not what was once written: what is wrong with it, in words."""


class UnreadableError(DamagedError):
    """The disk did not let it be read, now; that proves nothing about what is there."""


def hash_file(path: Path, *, from_disk: bool = False) -> str:
    """The SHA-256 of `path` in hex; `from_disk` drops the machine's cached copy first, where the system can."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _files(folder: Path, skip: str) -> Iterator[tuple[str, Path]]:
    for _, files in walk(folder):
        for path in files:
            relative = path.relative_to(folder)
            if relative.as_posix() != MANIFEST and relative.parts[0] != skip:
                yield relative.as_posix(), path


def write_manifest(folder: Path, content: dict[str, Any], *, skip: str = "") -> None:
    """Write `folder`'s manifest: `content` (plain JSON), the size and hash of each file, and a checksum of itself.

    The files must be complete; they are synced before the manifest is. The sub-folder `skip` has a manifest of its own.
    """
    assert not {"files", "manifest_version", "checksum"} & set(content), "these keys belong to the manifest itself"
    present = sorted(_files(folder, skip))
    files = {name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for name, path in present}
    sync_tree(folder)
    text = _manifest_text({"manifest_version": MANIFEST_VERSION, **content, "files": files})
    path = folder / MANIFEST
    with path.open("x", encoding="ascii", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _manifest_text(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=1, ensure_ascii=True)
    checksum = hashlib.sha256(body.encode("ascii")).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1, ensure_ascii=True) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, itself proven by its checksum; raises DamagedError with the reason."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise DamagedError(f"{printable(path)} is missing")
        if path.stat().st_size > MANIFEST_LIMIT:
            raise DamagedError(f"{printable(path)} is larger than any manifest")
        text = path.read_bytes().decode("ascii")
        content: dict[str, Any] = json.loads(text)
        stored = content.pop("checksum", None) if isinstance(content, dict) else None
        # Rewriting proves every byte, also those a JSON reader would not miss.
        if stored is None or _manifest_text(content) != text:
            raise DamagedError(f"{printable(path)} does not match its own checksum")
        if content["manifest_version"] != MANIFEST_VERSION:
            raise DamagedError(f"{printable(path)} has version {content['manifest_version']!r}, not {MANIFEST_VERSION}")
        for entry in content["files"].values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise DamagedError(f"{printable(path)} lists {printable(entry)} as a file")
    except OSError as error:
        raise UnreadableError(f"{printable(path)} cannot be read: {printable(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{printable(path)} cannot be read: {printable(error)}") from error
    return content


def verify_folder(folder: Path, *, skip: str = "", hashes: bool = True, from_disk: bool = False) -> dict[str, Any]:
    """Compare `folder` with its manifest, sizes first, then (unless told not to) hashes, and return the manifest.

    Files that the manifest does not name are none of ours and pass. Raises DamagedError that names the first bad file.
    """
    content = read_manifest(folder)
    try:
        _compare(folder, dict(_files(folder, skip)), content["files"], hashes, from_disk)
    except OSError as error:
        raise UnreadableError(f"{printable(folder)} cannot be read: {printable(error)}") from error
    return content


def _compare(
    folder: Path, present: dict[str, Path], listed: dict[str, dict[str, Any]], hashes: bool, from_disk: bool
) -> None:
    # The names on the disk are looked up in the manifest, never the other way round: a manifest cannot point elsewhere.
    for name, entry in listed.items():
        if name not in present:
            raise DamagedError(f"{printable(folder / MANIFEST)} names {printable(name)}, which is missing")
        size = present[name].stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{printable(present[name])} has {size} bytes instead of {entry['bytes']}")
    for name, entry in listed.items() if hashes else ():
        if hash_file(present[name], from_disk=from_disk) != entry["sha256"]:
            raise DamagedError(f"{printable(present[name])} has changed since it was written (its hash differs)")
