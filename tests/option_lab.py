"""Runs that differ in one option: a tiny model, six photographs, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from data.batches import Batch
    from data.dataset import TrainingSet
    from training.session import Session
    from utils.config import Options
    from utils.device import Device
    from utils.models import Models

SUBJECTS = ("cat", "coffee")


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        code: its exit code.
        told: all that it wrote to the console.
        logdir: with one run folder in it, if the run got so far.
    """

    code: int
    told: str
    logdir: Path

    @cached_property
    def folder(self) -> Path:
        """The run folder."""
        (folder,) = self.logdir.iterdir()
        return folder

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]

    def scalars(self, tag: str) -> list[float]:
        """All values of `tag`, in order."""
        return [row[tag] for row in self.metrics if tag in row]

    @property
    def resolved(self) -> dict[str, Any]:
        """The resolved options of the run folder."""
        content: dict[str, Any] = json.loads((self.folder / f"{self.folder.name}_main.json").read_text())
        return content

    @property
    def ckpts(self) -> list[str]:
        """The names of the checkpoints."""
        return sorted(path.name for path in (self.folder / "ckpts").iterdir())

    @property
    def last(self) -> Path:
        """The checkpoint of the end that holds the training state."""
        (folder,) = (self.folder / "ckpts").glob("last-*[!a]")
        return folder

    @cached_property
    def state(self) -> Any:
        """The training state of the end."""
        from utils.checkpoint import load_training_state

        return load_training_state(self.last)

    def weights(self, part: str) -> dict[str, Tensor]:
        """The weights of a network at the end, by name."""
        tensors: dict[str, Tensor] = self.state["networks"][part]
        return tensors

    @property
    def images(self) -> int:
        """Images trained in all."""
        count: int = json.loads((self.last / "manifest.json").read_text())["progress"]["images"]
        return count

    @property
    def samples(self) -> list[str]:
        """The names of the sample pictures."""
        return sorted(path.name for path in (self.folder / "samples").glob("*.jpg"))


@dataclass
class Lab:
    """Makes runs; equal ones are made once.

    Args:
        folder: for everything that is written.
    """

    folder: Path
    made: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from starter.make_model import random_model
        from tests.photos import make_photo_folder

        self.model = random_model(self.folder / "model")
        self.photos = self.folder / "photos"
        for path in make_photo_folder(self.photos):
            if not path.name.startswith(SUBJECTS):
                path.unlink()
                path.with_suffix(".txt").unlink()
        self.write("optimizer.json", {"base": {"optimizer": "adamw", "lr": 1e-3}})

    def write(self, name: str, content: object) -> str:
        """The path of a JSON file with `content`."""
        path = self.folder / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    def base(self) -> dict[str, Any]:
        """The options of every run, unless it says otherwise."""
        return {
            "project_name": "lab",
            "resume_ckpt": str(self.model),
            "data_root": str(self.photos),
            "resolution": 64,
            "bucket_step": 16,
            "batch_size": 2,
            "max_steps": 2,
            "num_workers": 0,
            "device": "cpu",
            "optimizer_config": str(self.folder / "optimizer.json"),
            "sample_prompts": "none",
            "log_step": 1,
            "no_save_ckpt": True,
            "data_index": "off",
        }

    def config(self, **changes: Any) -> tuple[str, Path]:
        """An options file, with log folder of its own unless `changes` names one, and that log folder."""
        place = self.folder / f"run{sum(1 for _ in self.folder.glob('run*')):03}"
        place.mkdir()
        values = {**self.base(), "logdir": str(place / "logs"), **changes}
        (place / "train.json").write_text(json.dumps(values), encoding="utf-8")
        return str(place / "train.json"), Path(values["logdir"])

    def run(self, **changes: Any) -> Outcome:
        """What `train.py` does under the base options with `changes`."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self.made:
            config, logdir = self.config(**changes)
            self.made[key] = self.start(["--config", config], logdir)
        return self.made[key]

    def start(self, argv: list[str], logdir: Path) -> Outcome:
        """What `train.py` does with these flags."""
        import train

        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = train.main(argv)
        return Outcome(code, told.getvalue(), logdir)

    def options(self, **changes: Any) -> Options:
        """The options that a run would have."""
        from utils.options import load_options

        return load_options(["--config", self.config(**changes)[0]]).options

    @contextlib.contextmanager
    def session(self, **changes: Any) -> Iterator[Session]:
        """A run with everything in place before its first update."""
        import train
        from training.assembly import open_session
        from training.inputs import read_inputs
        from utils.start import find_start
        from utils.stopping import StopSignal

        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            inputs = read_inputs(["--config", self.config(**changes)[0]])
            start = find_start(inputs.options)
            data = train.read_data(inputs, start)
            with StopSignal() as stop, open_session(inputs, data, start, stop) as session:
                yield session

    @cached_property
    def models(self) -> Models:
        """The tiny model."""
        from utils.models import load_models

        return load_models(self.model)

    def device(self, kind: str = "cpu") -> Device:
        """A device in fp32."""
        import torch

        from utils.device import Device

        return Device(torch.device(kind), kind, None)

    def loader(self, **changes: Any) -> tuple[Any, TrainingSet]:
        """What brings the batches, and the training set that they are of."""
        from data.dataset import read_training_set
        from training.parts import build_batches

        options = self.options(**changes)
        data = read_training_set(options.data, seed=options.run.seed, epochs=1, max_steps=None)
        return build_batches(self.models, options, data, self.device()), data

    def batches(self, **changes: Any) -> list[Batch]:
        """The batches of the first epoch, as the loop would get them."""
        loader, data = self.loader(**changes)
        return list(loader.epoch(data.plan(0)))

    def workers(self, **changes: Any) -> list[str]:
        """The kinds of the processes that bring the batches, one for each beside this one."""
        loader, data = self.loader(**changes)
        try:
            batches = loader.epoch(data.plan(0))
            next(batches)
            kinds = [type(child).__name__ for child in multiprocessing.active_children()]
            list(batches)
        finally:
            loader.close()
        return kinds

    def draws(self, **changes: Any) -> dict[str, Tensor]:
        """The draws of the first epoch by name, visits in the order of their pictures."""
        import torch

        batches = self.batches(**changes)
        ids = [visit.item.id for batch in batches for visit in batch.visits]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        values: dict[str, Tensor] = {}
        for name in ("timesteps", "latent_noise", "noise", "embedding_noise", "input_noise"):
            rows = [row for batch in batches if getattr(batch.draws, name) is not None for row in _rows(batch, name)]
            if rows:
                values[name] = torch.cat([rows[place].flatten() for place in order])
        return values


def _rows(batch: Batch, name: str) -> list[Tensor]:
    return list(getattr(batch.draws, name))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    assert one.keys() == other.keys()
    return all((one[name] == other[name]).all() for name in one)


class WandbDouble(types.ModuleType):
    """Stands for the package wandb and remembers what it was told: nothing may leave this machine."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.config = self
        self.Settings = self.Html = self.Image = self.Histogram = lambda *_, **__: None

    def login(self, **_: Any) -> bool:
        """Somebody is."""
        return True

    def init(self, *, name: str, **_: Any) -> WandbDouble:
        """The one run."""
        self.names.append(name)
        return self

    def log(self, values: dict[str, Any]) -> None:
        """Remember a row."""
        self.rows.append(values)

    def update(self, *_: Any, **__: Any) -> None:
        """The run's config, which is not looked at."""

    def define_metric(self, *_: Any, **__: Any) -> None:
        """An axis, which is not looked at."""

    def finish(self) -> None:
        """The end."""
