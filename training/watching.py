"""What a run shows of itself besides its loss: options and data in words, held-out images, the ledger of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batches import Batch
from data.buckets import nearest_bucket
from data.item import Bucket, Item
from data.probes import Probe, Validation
from data.validation import WatchedSet
from data.validation_file import ValidationFile
from optimizer.objective import Networks, Objective, to_unit_range
from optimizer.probe import probe_losses
from utils.borrow import undisturbed, weights_swapped
from utils.contact_sheet import MOST, contact_sheet
from utils.device import Device
from utils.ledger import Ledger
from utils.logs import LOGGER
from utils.models import Models, tokenize
from utils.tracking import Tracker

if TYPE_CHECKING:
    from torch import Tensor

Versions = Mapping[str, Mapping[str, Mapping[str, "Tensor"]]]


@dataclass(slots=True)
class Watching:
    """What is watched in a run.

    Args:
        folder: of the run; the ledger's tables go there.
        captions: as they stand in the files, by item id.
        validation: `None` without a validation file.
        due: the updates after which validation is due.
    """

    tracker: Tracker
    folder: Path
    models: Models
    device: Device
    captions: Mapping[str, str]
    validation: Validation | None = None
    due: frozenset[int] = frozenset()
    loss_of: Any = None
    ledger: Ledger = field(default_factory=Ledger)
    _first: tuple[list[Tensor], list[str]] = field(default_factory=lambda: ([], []))

    def announce(self, options: Mapping[str, Any], report: str, run_name: str | None) -> None:
        """Lay out the board and put the options and the data on it, in words."""
        width = max(len(name) for name in options)
        lines = [f"{name:<{width}}  {'' if value is None else value}" for name, value in options.items()]
        self.tracker.layout()
        self.tracker.text("config", "\n".join([f"run {run_name or self.folder.name}", "", *lines]))
        self.tracker.text("data", report)
        self.tracker.hparams(options)

    def note(self, batch: Batch, losses: Tensor, *, update: int) -> None:
        """Enter a micro-batch of the update after `update` into the ledger; the first update is shown on the board."""
        ids = [
            visit.item.id if caption or not self.captions.get(visit.item.id) else None
            for visit, caption in zip(batch.visits, batch.captions, strict=True)
        ]
        self.ledger.add(ids, losses, batch.draws.timesteps)
        if update == 0 and len(self._first[0]) < MOST:
            self._first[0].extend(batch.pixels)
            self._first[1].extend(batch.captions)

    def show_first_update(self) -> None:
        """The images of the first update as the networks got them, each with its caption."""
        if self._first[0]:
            self.tracker.image("first_update", contact_sheet(*self._first), 1)
            self._first = ([], [])

    def validate(self, update: int, versions: Versions) -> bool:
        """Whether validation was due after `update`; its scalars are reported for each of `versions` of the weights."""
        if self.validation is None or update not in self.due:
            return False
        networks = (self.models.unet, self.models.text_encoder, self.models.vae)
        for label, weights in versions.items():
            with ExitStack() as stack:
                for name, tensors in weights.items():
                    stack.enter_context(weights_swapped(getattr(self.models, name), tensors))
                stack.enter_context(undisturbed(*networks, device=self.device.torch_device))
                scalars = self.validation.run(update, self.loss_of, label=label)
            self.tracker.scalars(update, scalars)
            shown = ", ".join(f"{tag} {value:.5f}" for tag, value in scalars.items() if tag.startswith("loss/"))
            LOGGER.info("validation after update %d: %s", update, shown)
        return True

    def after_epoch(self, update: int) -> None:
        """Write the ledger's tables and show how often each range of timesteps was trained."""
        try:
            self.ledger.write(self.folder, self.captions)
        except OSError as error:
            LOGGER.warning("the tables of losses could not be written: %s", error)
        self.tracker.histogram("timesteps", *self.ledger.histogram(), update)

    def state(self) -> dict[str, Any]:
        """What a run needs to know to go on: plain JSON values."""
        return {
            "ledger": self.ledger.state(),
            "validation": None if self.validation is None else self.validation.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.ledger.load_state(state["ledger"])
        if self.validation is not None and state["validation"] is not None:
            self.validation.load_state(state["validation"])


def build_validation(
    file: ValidationFile,
    sets: Sequence[WatchedSet],
    buckets: Sequence[Bucket],
    models: Models,
    networks: Networks,
    device: Device,
    *,
    timesteps: tuple[int, int],
    keep_tags: int,
) -> Validation | None:
    """The validation of a run, or `None` when there is nothing to watch."""
    if not sets:
        return None

    def bucket_of(item: Item) -> Bucket:
        return nearest_bucket(item.width, item.height, buckets)

    def encode(pixels: Tensor) -> Tensor:
        return networks.encode_image(to_unit_range(pixels.to(device.torch_device))).mean

    return Validation(
        sets,
        bucket_of,
        encode,
        timesteps,
        seed=file.seed,
        batch_size=file.batch_size,
        relative=file.use_relative_loss,
        keep_tags=keep_tags,
    )


def loss_of_probes(models: Models, networks: Networks, objective: Objective, device: Device) -> Any:
    """What `Validation.run` asks: the losses of a probe, computed where the networks are."""
    return partial(_probe, models, networks, objective, device)


def _probe(
    models: Models, networks: Networks, objective: Objective, device: Device, probe: Probe
) -> Mapping[str, Tensor]:
    where = device.torch_device
    return probe_losses(
        networks,
        objective,
        probe.latents.to(where),
        tokenize(models, probe.captions).to(where),
        probe.timesteps.to(where),
        probe.noise.to(where),
    )
