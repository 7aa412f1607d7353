"""Weights & Biases: everything that goes to TensorBoard goes there as well, when `wandb` is on."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.seeding import stream_seed
from utils.sinks import Sink, small_jpeg

if TYPE_CHECKING:
    from PIL.Image import Image


def open_mirror(project: str, run_name: str | None, folder: Path) -> Callable[[int | None], Sink]:
    """A maker of the sink for the run in `folder`, whose name it has there unless there is a `run_name`.

    A run that goes on goes on there, too. Credentials come from the environment or from `wandb login`, and are
    written nowhere. Raises `UserError` when the package is missing or nobody is logged in.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("wandb = true, but the package is missing; pip install wandb, or leave wandb out") from None
    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.login(prompt=False, verify=False):
        raise UserError(
            "wandb = true, but nobody is logged in; run wandb login, or set WANDB_MODE=offline and sync later"
        )
    name = folder.name if run_name is None else run_name

    def open_sink(_: int | None) -> Sink:
        return WandbSink(project, name, folder)

    return open_sink


class WandbSink:
    """One run at Weights & Biases, or its files below `wandb/` of the run folder when offline."""

    def __init__(self, project: str, name: str, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, disable_job_creation=True, init_timeout=60
        )
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=f"{stream_seed(0, 'wandb', str(folder.resolve())):016x}",
            dir=str(folder),
            resume="allow",
            settings=settings,
        )
        # Charts go by the update, not by the number of calls.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log({**values, "update": update})

    def text(self, tag: str, text: str, update: int) -> None:
        """A page with the text as it is."""
        import wandb

        self._run.log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "update": update})

    def image(self, tag: str, picture: Image, update: int) -> None:
        """The same small picture that TensorBoard gets."""
        import wandb
        from PIL import Image as Pictures

        _, data = small_jpeg(picture)
        small = wandb.Image(Pictures.open(io.BytesIO(data)), file_type="jpg")
        self._run.log({tag: small, "update": update})

    def histogram(self, tag: str, counts: Sequence[int], edges: Sequence[float], update: int) -> None:
        """The counts as they are."""
        import wandb

        self._run.log({tag: wandb.Histogram(np_histogram=(list(counts), list(edges))), "update": update})

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Its users lay out their own workspace."""

    def hparams(self, options: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The options become the run's config."""
        given = {name: value for name, value in options.items() if value is not None}
        self._run.config.update(given, allow_val_change=True)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
