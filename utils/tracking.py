"""What a run reports of itself, to all that listen: TensorBoard, metrics.jsonl and, when asked, Weights & Biases."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from utils.sinks import EventSink, Guard, MetricsSink, Sink

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = "metrics.jsonl"
# A table of every option would show none of these.
COMPARED = (
    *("optimizer", "lr", "lr text encoder", "lr_scheduler", "batch_size", "grad_accum", "resolution", "max_epochs"),
    *("disable_unet_training", "disable_textenc_training", "clip_skip", "cond_dropout", "flip_p", "seed"),
    *("zero_frequency_noise_ratio", "enable_zero_terminal_snr", "min_snr_gamma", "loss_type", "clip_grad_norm"),
    *("timestep_start", "timestep_end", "ema_decay_rate", "ema_strength_target", "shuffle_tags"),
)
Charts = dict[str, dict[str, list[str]]]
BANDS = 4


def charts(
    watched: Sequence[str] = (),
    *,
    relative: bool = False,
    norms: bool = True,
    loss_scale: bool = False,
    memory: bool = False,
) -> Charts:
    """The charts of a run, in groups: title and patterns of tags, for what the run will report and nothing else.

    One chart has curves of one kind only, because TensorBoard gives all curves of a run the same colour.

    Args:
        watched: names of the watched sets, in order.
    """
    layout: Charts = {"loss": {"training": ["loss/log_step$", "loss/epoch$"]}}
    if watched:
        layout["validation"] = {name: [f"loss/{re.escape(name)}( ema)?$"] for name in watched}
        if relative:
            layout["validation"]["relative to the first"] = ["validation/.* relative$"]
        for band in range(1, BANDS + 1):
            tag = f"validation/{re.escape(watched[0])} band {band} "
            layout["validation"][f"{watched[0]}, band {band} of {BANDS}"] = [tag]
    layout["rates"] = {"learning rate": ["hyperparameter/lr "]}
    if norms:
        layout["rates"]["gradient norm"] = ["optimizer/.*_grad_norm$"]
        layout["rates"]["gradient norm before clipping"] = ["optimizer/.*_pre_clip_norm$"]
    if loss_scale:
        layout["rates"]["loss scale"] = ["hyperparameter/grad scale$"]
    layout["performance"] = {
        "images per second": ["performance/images per second$"],
        "minutes per epoch": ["performance/minutes per epoch$"],
    }
    if memory:
        layout["performance"]["memory"] = ["performance/vram$"]
    return layout


class Tracker:
    """All sinks of a run. None of them can end it: a sink that fails warns once and is tried again later."""

    def __init__(
        self,
        folder: Path | None,
        *,
        resume_update: int | None = None,
        mirror: Callable[[int | None], Sink] | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        """`folder` is the run's; `None` reports to nobody (processes other than the first of several).

        `resume_update`: the run goes on after this update; what an earlier start reported beyond it is dropped.
        `mirror`: makes one more sink (see `utils.mirror`).
        """
        self._guards: list[Guard] = []
        if folder is None:
            return
        openers: dict[str, Callable[[int | None], Sink]] = {
            "TensorBoard's event file": lambda update: EventSink(folder, update),
            METRICS: lambda update: MetricsSink(folder / METRICS, update),
        }
        if mirror is not None:
            openers["Weights & Biases"] = mirror
        self._guards = [
            Guard(name, _resuming_once(opener, resume_update), retry_seconds=retry_seconds)
            for name, opener in openers.items()
        ]

    def scalars(self, update: int, values: Mapping[str, SupportsFloat]) -> None:
        """Report one number for each tag. Tensors are read here, so hand them over only when it is time to log."""
        if self._guards and values:
            numbers = {tag: float(value) for tag, value in values.items()}
            self._tell("scalars", update, numbers)

    def text(self, tag: str, text: str, update: int = 0) -> None:
        """Report a text, shown as it is: nothing in it is taken for markdown or HTML."""
        self._tell("text", tag, text, update)

    def image(self, tag: str, picture: Image, update: int) -> None:
        """Report a picture."""
        self._tell("image", tag, picture, update)

    def histogram(self, tag: str, counts: Sequence[int], edges: Sequence[float], update: int) -> None:
        """Report counts between `edges`, of which there is one more."""
        self._tell("histogram", tag, list(counts), list(edges), update)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Group curves into charts: for each group the charts, for each chart the tags or patterns of tags."""
        self._tell("layout", charts)

    def hparams(self, options: Mapping[str, Any], metrics: Sequence[str] = ("loss/epoch", "loss/val")) -> None:
        """Report those of `options` by which runs are compared, and the tags by which they are judged."""
        compared = {name: options[name] for name in COMPARED if name in options}
        self._tell("hparams", compared, list(metrics))

    def close(self) -> None:
        """Write what has waited and let go of the sinks."""
        for guard in self._guards:
            guard.close()
        self._guards = []

    def _tell(self, method: str, *arguments: Any) -> None:
        for guard in self._guards:
            guard.call(method, *arguments)


def _resuming_once(opener: Callable[[int | None], Sink], resume_update: int | None) -> Callable[[], Sink]:
    """`opener` with `resume_update`, until it has worked: a sink opened anew must not drop what came since."""
    pending = [resume_update]

    def open_sink() -> Sink:
        sink = opener(pending[0])
        pending[0] = None
        return sink

    return open_sink


def plain_words(text: str) -> str:
    """The letters (without accents) and digits of `text`, everything else as single underscores: safe in a tag."""
    flat = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^A-Za-z0-9]+", "_", flat).strip("_")


def sample_tag(index: int, prompt: str) -> str:
    """`sample_{i:03}_{prompt}` in letters and digits only, so that no prompt can upset TensorBoard."""
    return f"sample_{index:03}_{plain_words(prompt)[:60].strip('_')}".rstrip("_")
