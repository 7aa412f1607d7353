"""Where figures and pictures go: TensorBoard's event files, metrics.jsonl, and the guard that keeps them harmless."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from utils.files import atomic_file
from utils.logs import LOGGER, append_whole

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_WAIT_SECONDS = 1000.0
PICTURE_SIDE = 1536
PICTURE_BYTES = 200 * 2**10
PICTURE_BUDGET = 256 * 2**20
SHOWN_OPTIONS = 5
_EVENTS = "events.out.tfevents"


class Sink(Protocol):
    """What takes figures, texts and pictures."""

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """Take one value for each tag."""

    def text(self, tag: str, text: str, update: int) -> None:
        """Take a text to be shown as it is."""

    def image(self, tag: str, picture: Image, update: int) -> None:
        """Take an RGB picture."""

    def histogram(self, tag: str, counts: Sequence[int], edges: Sequence[float], update: int) -> None:
        """Take counts between `edges`, of which there is one more."""

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Take groups of charts, each with the tags (or patterns of tags) it draws."""

    def hparams(self, options: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Take the options to compare runs by (`None`: not given), and the tags to judge them by."""

    def close(self) -> None:
        """Nothing comes any more."""


def _second(path: Path) -> int:
    """The second in the name of an event file."""
    digits = path.name.split(".")[3]
    return int(digits) if len(digits) == 10 and digits.isdecimal() else 0


class EventSink:
    """Event files that TensorBoard reads: written at once and whole, without a thread that could die on its own."""

    def __init__(self, folder: Path, resume_update: int | None = None) -> None:
        """A new file in `folder`; when a run goes on from `resume_update`, points after it are hidden."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob(f"{_EVENTS}.*"))
        # The budget is the run's, not that of one start or of one file.
        self._picture_bytes = sum(path.stat().st_size for path in earlier)
        # TensorBoard reads by name, and this is to be read last, whatever the clock did since the file before.
        second = max([int(time.time()), *(1 + _second(path) for path in earlier)])
        self.path = folder / f"{_EVENTS}.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._told = False
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_update is not None:
            log = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=resume_update + 1, session_log=log))

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """One event with a value for each tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._summary(Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]), update)

    def text(self, tag: str, text: str, update: int) -> None:
        """A block of code, four spaces in: no markdown or HTML in a caption can act there, nor end the block."""
        from torch.utils.tensorboard.summary import text as text_summary

        lines = text.replace("\r", "\n").split("\n")
        self._summary(text_summary(tag, "\n".join(f"    {line}" for line in lines)), update)

    def image(self, tag: str, picture: Image, update: int) -> None:
        """A small JPEG; the original is on the disk. When the budget of the run is spent, none is added."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        small, data = small_jpeg(picture)
        if self._picture_bytes + len(data) > PICTURE_BUDGET:
            if not self._told:
                self._told = True
                LOGGER.info("TensorBoard has %d MiB of pictures; more are on disk only", PICTURE_BUDGET // 2**20)
            return
        self._picture_bytes += len(data)
        content = Summary.Image(height=small.height, width=small.width, colorspace=3, encoded_image_string=data)
        self._summary(Summary(value=[Summary.Value(tag=tag, image=content)]), update)

    def histogram(self, tag: str, counts: Sequence[int], edges: Sequence[float], update: int) -> None:
        """A histogram from its counts; each stands for the middle of its bin in the sums."""
        from torch.utils.tensorboard.summary import histogram_raw

        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
        squares = sum(count * middle * middle for count, middle in zip(counts, middles, strict=True))
        summary = histogram_raw(
            tag, edges[0], edges[-1], sum(counts), total, squares, [edges[0], *edges[1:]], [0, *counts]
        )
        self._summary(summary, update)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """The charts of the tab "Custom scalars"."""
        from torch.utils.tensorboard.summary import custom_scalars

        layout = {
            group: {title: ["Multiline", list(tags)] for title, tags in titles.items()}
            for group, titles in charts.items()
        }
        self._summary(custom_scalars(layout), 0)

    def hparams(self, options: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The options for the tab "HParams", the first ones in front; what is neither number nor text is JSON."""
        from tensorboard.plugins.hparams.api_pb2 import DataType
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        known = {
            name: value if isinstance(value, float | str) or type(value) is int else json.dumps(value)
            for name, value in options.items()
            if value is not None
        }
        experiment, *session = hparams(known, dict.fromkeys(metrics, 0.0))
        content = HParamsPluginData.FromString(experiment.value[0].metadata.plugin_data.content)
        for info in content.experiment.hparam_infos:
            # The table opens with the first five columns: those that differ, then by the alphabet.
            info.differs = info.name in list(known)[:SHOWN_OPTIONS]
        for name in options.keys() - known.keys():
            # The columns of one run are those of all; what this one leaves out, numbers all, another may give.
            content.experiment.hparam_infos.add(name=name, type=DataType.Value("DATA_TYPE_FLOAT64"))
        experiment.value[0].metadata.plugin_data.content = content.SerializeToString()
        for summary in (experiment, *session):
            self._summary(summary, 0)

    def close(self) -> None:
        """Nothing is open between two writes."""

    def _summary(self, summary: Any, update: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._append(Event(wall_time=time.time(), step=update, summary=summary))

    def _append(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append_whole(self.path, record.getvalue())


def small_jpeg(picture: Image) -> tuple[Image, bytes]:
    """`picture` as a JPEG that is small enough for an event file, and the picture of that size."""
    small = picture.convert("RGB")
    if max(small.size) > PICTURE_SIDE:
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    for quality in (88, 75, 60, 40):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= PICTURE_BYTES:
            break
    return small, buffer.getvalue()


class MetricsSink:
    """`metrics.jsonl`: the scalars, a JSON object a log: `update`, `time` (Unix seconds) and the tags."""

    def __init__(self, path: Path, resume_update: int | None = None) -> None:
        """Append to `path`; when a run goes on from `resume_update`, rows after it and torn rows are taken out."""
        self.path = path
        if resume_update is not None and path.exists():
            _keep_rows(path, resume_update)

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """A line. JSON has no NaN and no infinity: those become null."""
        row: dict[str, Any] = {"update": update, "time": round(time.time(), 3)}
        row |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        append_whole(self.path, (json.dumps(row, allow_nan=False) + "\n").encode("ascii"))

    def text(self, tag: str, text: str, update: int) -> None:
        """Texts have files of their own."""

    def image(self, tag: str, picture: Image, update: int) -> None:
        """Pictures have files of their own."""

    def histogram(self, tag: str, counts: Sequence[int], edges: Sequence[float], update: int) -> None:
        """Not a scalar."""

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Not a scalar."""

    def hparams(self, options: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The options have a file of their own."""

    def close(self) -> None:
        """Nothing is open between two writes."""


def _keep_rows(path: Path, last_update: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _row_update(line) is not None and _row_update(line) <= last_update]  # type: ignore[operator]
    if kept != lines:
        with atomic_file(path) as partial:
            partial.write_bytes(b"".join(kept))


def _row_update(line: bytes) -> int | None:
    try:
        update = json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return None
    return update if isinstance(update, int) and line.endswith(b"\n") else None


class Guard:
    """A sink that may fail: it warns once, keeps the figures, and is opened anew after a while."""

    def __init__(self, name: str, opener: Callable[[], Sink], *, retry_seconds: float = 60.0) -> None:
        """`opener` makes the sink; it is called here, and again after each failure."""
        self.name = name
        self._opener = opener
        self._sink: Sink | None = None
        self._first_wait = self._wait = retry_seconds
        self._retry_at = 0.0
        self._told = False
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=10_000)
        self.call("")

    def call(self, method: str, *arguments: Any) -> None:
        """Call `method` of the sink, and before it what has waited. Pictures are not kept while the sink fails."""
        if method and method != "image":
            self._waiting.append((method, arguments))
        if self._sink is None and time.monotonic() < self._retry_at:
            return
        try:
            if self._sink is None:
                self._sink = self._opener()
            while self._waiting:
                waiting, values = self._waiting[0]
                getattr(self._sink, waiting)(*values)
                self._waiting.popleft()
            if method == "image":
                self._sink.image(*arguments)
        except Exception as error:  # noqa: BLE001  a log that fails must not end a run, whatever its library raises
            if self._waiting and not isinstance(error, OSError):
                self._waiting.popleft()  # what cannot be written at all must not hold up the rest
            self._sink = None
            self._retry_at = time.monotonic() + self._wait
            # A server that cannot be reached may take a minute to say so; that must not become every minute.
            self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS)
            if not self._told:
                self._told = True
                LOGGER.warning(
                    "%s cannot be written (%s: %s); training goes on and it is tried again in %.0f s",
                    *(self.name, type(error).__name__, str(error), self._first_wait),
                )
        else:
            self._wait = self._first_wait

    def close(self) -> None:
        """A last try at what has waited; then the sink is closed."""
        self._retry_at = 0.0
        self.call("close")
