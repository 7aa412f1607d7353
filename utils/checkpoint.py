"""What a checkpoint is on the disk: its name, what it says of itself, and how it is read and proven."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from utils.errors import printable
from utils.files import is_leftover
from utils.manifest import MANIFEST, DamagedError, read_manifest, verify_folder
from utils.tree import Tree, load_tree

FORMAT = "emulsion-checkpoint"
FORMAT_VERSION = 1
STATE = "training_state"
STATES_KEPT = 2

Kind = Literal["", "last", "errored", "interrupted"]
T = TypeVar("T")
_CLASSES: dict[Any, Any] = {float: (float, int), Kind: str}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, in counts; with the seed they fix every draw still to come.

    Args:
        update: updates done, the global step.
        epoch: the epoch in hand, from 0.
        update_in_epoch: updates of that epoch done.
        images: images trained since the start.
        seconds: time spent so far, for the ETA only.
    """

    update: int
    epoch: int
    update_in_epoch: int
    images: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Record:
    """What a checkpoint says of itself in its manifest.

    Args:
        kind: why it was saved; it leads the name. "" is a regular one.
        finished: the run was complete, so its weights start a new run instead of being resumed.
        ema: the folder holds the averaged weights.
        run: name of the run folder.
        versions: of the libraries that wrote it.
        extra: anything else, plain JSON (options, a fingerprint of the data).
    """

    project: str
    progress: Progress
    seed: int
    kind: Kind = ""
    finished: bool = False
    ema: bool = False
    run: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`{kind-}{project}-ep{E:02}-gs{S:05}{_ema}`."""
        prefix = f"{self.kind}-" if self.kind else ""
        return checkpoint_name(self.project, self.progress, prefix) + ("_ema" if self.ema else "")


def checkpoint_name(project: str, progress: Progress, prefix: str = "") -> str:
    """`{prefix}{project}-ep{E:02}-gs{S:05}`; `prefix` is empty, `last-`, `errored-` or `interrupted-`."""
    return f"{prefix}{project}-ep{progress.epoch:02}-gs{progress.update:05}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose manifest has been read; `saved_at` (Unix seconds) grows with every save of a run."""

    folder: Path
    record: Record
    saved_at: float

    @property
    def has_state(self) -> bool:
        """Whether the training state is still there, as an exact resume needs it."""
        return (self.folder / STATE).is_dir()

    @property
    def good(self) -> bool:
        """Whether it may be resumed: a run that failed in the middle of an update leaves doubtful weights."""
        return self.record.kind != "errored"


def prove(folder: Path, *, from_disk: bool = True) -> None:
    """Compare every byte of the checkpoint `folder` with its manifests; raises DamagedError with the reason."""
    content = verify_folder(folder, skip=STATE, from_disk=from_disk)
    if (folder / STATE).is_dir():
        state = verify_folder(folder / STATE, from_disk=from_disk)
        if state.get("of") != content.get("name"):
            raise DamagedError(f"{printable(folder / STATE)} belongs to {printable(state.get('of'))}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, by its manifest alone; raises DamagedError when it is none of ours, or damaged."""
    content = read_manifest(folder)
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise DamagedError(f"{printable(folder)} is in another format than {FORMAT} {FORMAT_VERSION}")
    try:
        progress = _fields(Progress, content["progress"])
        record = _fields(Record, {**content, "progress": progress})
        return _fields(Checkpoint, {**content, "folder": folder, "record": record})
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{printable(folder / MANIFEST)} lacks something: {printable(error)}") from error


def _fields(kind: type[T], content: dict[str, Any]) -> T:
    """`kind` from the entries that bear the names of its fields; raises KeyError and TypeError."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    made = kind(**{name: content[name] for name in names})
    for name, wanted in get_type_hints(kind).items():
        value = getattr(made, name)
        if not isinstance(value, _CLASSES.get(wanted, get_origin(wanted) or wanted)) or isinstance(value, bool) != (
            wanted is bool
        ):
            raise TypeError(f"{name} is {value!r}")
    return made


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint of ours, damaged or not."""
    return (folder / MANIFEST).is_file() and not is_leftover(folder)


def list_checkpoints(ckpts: Path) -> list[Checkpoint]:
    """The checkpoints below `ckpts` whose manifests can be read, newest save first; unproven."""
    found = []
    for folder in sorted(ckpts.iterdir()):
        if folder.is_dir() and is_checkpoint(folder):
            try:
                found.append(read_checkpoint(folder))
            except DamagedError:
                continue
    return sorted(found, key=lambda c: c.saved_at, reverse=True)


def load_training_state(folder: Path, *, verify: bool = True) -> Tree:
    """The training state of the checkpoint `folder`, tensors on the CPU; `verify=False` when that was just done.

    Raises DamagedError when it is missing or not what was written.
    """
    if not (folder / STATE).is_dir():
        raise DamagedError(f"{printable(folder)} holds no training state (only the newest {STATES_KEPT} saves keep it)")
    if verify:
        verify_folder(folder / STATE)
    return load_tree(folder / STATE, "state")
