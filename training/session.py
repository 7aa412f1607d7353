"""A run with all its parts in place, and what has to be kept of it to go on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.batches import Batch
from data.dataset import TrainingSet
from data.item import Bucket, Visit
from data.probes import Validation
from data.substitutes import Failures
from data.workers import Batches
from optimizer.build import Part
from optimizer.ema import Ema
from optimizer.in_backward import UpdaterInBackward
from optimizer.objective import Networks, Objective
from optimizer.update import StepResult, Updater
from training.inputs import Inputs
from utils.archive import Archive
from utils.checkpoint import Kind, Progress
from utils.config import Options
from utils.console import Bar
from utils.control import ControlFile
from utils.device import Device
from utils.errors import OutOfMemoryError, UserError
from utils.gallery import Gallery
from utils.ledger import Ledger
from utils.logs import LOGGER
from utils.meter import Meter
from utils.models import Models
from utils.run_dir import RunDir
from utils.stopping import StopSignal
from utils.timetable import Timetable
from utils.tracking import Tracker
from utils.writer import CheckpointWriter, SaveResult

SCHEDULE_FREE = "adamw_schedulefree"

if TYPE_CHECKING:
    from torch import Tensor

    from utils.tree import Tree


@dataclass(slots=True)
class Session:
    """The parts of a run.

    Args:
        seed: the resolved one; `options.run.seed` may be -1.
        inputs: as read last; `options` are those in force.
        captions: of the last update, for samples without a prompt.
        last: what the last update did.
        last_loss: the loss that was logged last.
        skipped_told: skipped updates that were told already.
        unread: number, image ids and success of each update since the last log; the success is on the device.
        first_batches: of the first update, until they have been shown.
        cut_off: what was due after the last update and gave way to a stop, "samples" or "validation".
        row_limits: buckets of which fewer images than `batch_size` fit into memory.
    """

    inputs: Inputs
    options: Options
    seed: int
    run: RunDir
    device: Device
    data: TrainingSet
    models: Models
    parts: Mapping[str, Part]
    networks: Networks
    objective: Objective
    updater: Updater
    ema: Ema | None
    batches: Batches
    tracker: Tracker
    gallery: Gallery
    validation: Validation | None
    ledger: Ledger
    failures: Failures
    control: ControlFile
    archive: Archive
    writer: CheckpointWriter
    bar: Bar
    stop: StopSignal
    progress: Progress
    window: Meter
    epoch_meter: Meter
    timetable: Timetable
    captions: tuple[str, ...] = ()
    last: StepResult | None = None
    last_loss: float | None = None
    skipped_told: int = 0
    unread: list[tuple[int, tuple[str, ...], Tensor]] = field(default_factory=list)
    row_limits: dict[Bucket, int] = field(default_factory=dict)
    first_batches: tuple[Batch, ...] = ()
    cut_off: set[str] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.progress.update >= self.data.total_updates

    @property
    def complete(self) -> bool:
        """Whether all updates are done and what is due after the last one, too: nothing is left to go on with."""
        return self.finished and not self.cut_off

    def trained(self) -> dict[str, dict[str, Tensor]]:
        """The trained weights of each part by name."""
        return {name: part.weights() for name, part in self.parts.items()}

    def answers(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights that are not those in the networks, because the optimizer answers with an average."""
        return {name: part.weights() for name, part in self.parts.items() if part.optimizer_name == SCHEDULE_FREE}

    def averages(self) -> dict[str, dict[str, Tensor]] | None:
        """The averaged weights of each part by name; `None` without EMA."""
        return None if self.ema is None else {name: self.ema.tensors(name) for name in self.parts}

    def state(self) -> Tree:
        """All that an exact resume needs and that `progress` and the seed do not fix; live tensors."""
        networks = {"unet": self.models.unet, "text_encoder": self.models.text_encoder, "vae": self.models.vae}
        return {
            "networks": {name: dict(network.state_dict()) for name, network in networks.items()},
            "answers": self.answers(),
            "updater": self.updater.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "epoch_meter": self.epoch_meter.state_dict(),
            "ledger": self.ledger.state(),
            "validation": None if self.validation is None else self.validation.state(),
            "cut_off": sorted(self.cut_off),
            "captions": list(self.captions) if self.cut_off else [],
        }

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Take moments and averages from a saved state; the networks were built from it already.

        Returns a line for each optimizer option that is another now.
        """
        changes = self.updater.load_state_dict(state["updater"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.epoch_meter.load_state_dict(state["epoch_meter"], self.device.torch_device)
        self.ledger.load_state(state["ledger"])
        if self.validation is not None and state["validation"] is not None:
            self.validation.load_state(state["validation"])
        self.cut_off, self.captions = set(state.get("cut_off", ())), tuple(state.get("captions", ()))
        return changes

    def save(self, kind: Kind = "", *, wait: bool = False) -> list[SaveResult]:
        """Save a checkpoint of this moment; without `wait` it is written while the training goes on."""
        saves = self.archive.saves(self.progress, kind, finished=self.complete, ema=self.ema is not None)
        results = []
        if wait:
            results = self.writer.save_now(self.state(), saves)
        else:
            self.writer.save(self.state(), saves)
        self.timetable.saved()
        return results

    def exact_after(self, error: UserError) -> bool:
        """Whether no update was half done when `error` was raised."""
        stepped = isinstance(self.updater, UpdaterInBackward) and isinstance(error, OutOfMemoryError)
        return not stepped

    def note_failure(self, visit: Visit, reason: str) -> None:
        """Log a picture that could not be decoded, once.

        Raises:
            UserError: too many of them in this epoch.
        """
        visits = sum(update.images for update in self.data.plan(visit.epoch))
        line = self.failures.add(visit, reason, visits)
        if line is not None:
            LOGGER.warning("%s", line)
