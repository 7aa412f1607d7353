"""What a run shows while it goes: one bar with the time left, or plain lines when nobody watches a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from utils.errors import printable
from utils.logs import FILE_ONLY, LOGGER, is_terminal, silence

AVERAGED = " ema"
# From the end of the first update on; the pace is known well enough then to say how long the run will take.
ESTIMATE_SECONDS = 10.0


class Bar:
    """One bar for the whole run. Use as a context manager, or call `close`."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` updates, of which a resumed run has done `start`; `stream`: default stdout."""
        self.total, self.start = total, start
        self._done = start
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._estimated = False
        self._shown = ""
        self._stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        if is_terminal(self._stream):
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # its thread would only wake up slow bars, which ours may be
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                # A terminal that does not know its width (docker run -t) would get an empty bar.
                **({"dynamic_ncols": True} if _columns(self._stream) else {"ncols": 100}),
                mininterval=0.2,
                # Its own guess of the time left swings with every sample; ours stands at the end of the line.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def advance(self, updates: int = 1) -> None:
        """Count updates, which is cheap; once the pace is known, the log hears how long the run will take."""
        self._done += updates
        if self._first is None:
            self._first = (self._done, self._clock())
        elif not self._estimated and self._clock() - self._first[1] >= ESTIMATE_SECONDS:
            self._estimate()
        if self._bar is not None:
            self._guard(lambda: self._redraw(updates))

    def show(
        self,
        *,
        epoch: int,
        loss: float | None = None,
        lr: float | None = None,
        images_per_second: float | None = None,
        memory_gib: tuple[float, float] | None = None,
    ) -> None:
        """Say how the run stands: `epoch` counts from 1, `memory_gib` is used and total. Called at every log."""
        parts = [f"epoch {epoch}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if lr is not None:
            parts.append(f"lr {lr:.2e}")
        if images_per_second is not None:
            parts.append(f"{images_per_second:.3g} images/s")
        if memory_gib is not None:
            parts.append(f"{memory_gib[0]:.1f} of {memory_gib[1]:.1f} GiB")
        self._shown = ", ".join(parts)
        left = self._left()
        self._estimated = self._estimated or bool(left)
        line = f"update {self._done}/{self.total}, {self._shown}{left}"
        if self._bar is None:
            LOGGER.info("%s", line)
        else:
            LOGGER.info("%s", line, extra=FILE_ONLY)
            self._guard(lambda: self._redraw(0, at_once=True))

    def seconds_left(self) -> float | None:
        """Seconds to the end at the pace so far, samples and saves included; `None` before the second update.

        The first update does not count: it bears what is built once.
        """
        if self._first is None or self._done == self._first[0]:
            return None
        done, since = self._first
        return (self._clock() - since) / (self._done - done) * max(0, self.total - self._done)

    def _left(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f", {duration(left)} left"

    def _estimate(self) -> None:
        self._estimated = True
        left = self.seconds_left()
        if left:
            line = f"about {duration(left)} for the {self.total - self._done} updates to come"
            LOGGER.info("%s", line, extra=None if self._bar is None else FILE_ONLY)

    def _redraw(self, updates: int, *, at_once: bool = False) -> None:
        self._bar.set_postfix_str((self._shown + self._left()).removeprefix(", "), refresh=False)
        self._bar.update(updates)
        if at_once:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands and go to the next line."""
        if self._bar is not None:
            self._guard(self._bar.close)
            self._bar = None

    def __enter__(self) -> Bar:
        """The bar itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self.close()

    def _guard(self, draw: Callable[[], Any]) -> None:
        try:
            draw()
        except (OSError, ValueError) as error:  # the terminal is gone; the run goes on without it
            silence(self._stream, error)
            self._bar.disable = True
            self._bar = None


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def duration(seconds: float) -> str:
    """`seconds` in words: 45s, 12m30s, 3h05m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def start_line(
    *,
    device: str,
    precision: str,
    parameters: Mapping[str, int],
    images: int,
    buckets: int,
    epochs: int,
    updates: int,
    seconds_left: float | None = None,
) -> str:
    """The totals of a run in one line.

    Args:
        parameters: trained ones, by network.
        seconds_left: for a run that goes on; a new one has no pace yet.
    """
    trained = ", ".join(f"{printable(name)} {_count(number)}" for name, number in parameters.items())
    left = "" if seconds_left is None else f", about {duration(seconds_left)} to go"
    return (
        f"{printable(device)}, {precision}; training {trained} parameters on {images} images in {buckets} "
        f"{'bucket' if buckets == 1 else 'buckets'}; {updates} updates in {epochs} "
        f"{'epoch' if epochs == 1 else 'epochs'}{left}"
    )


def validation_line(values: Mapping[str, float]) -> str:
    """The losses of a validation pass in a line, by set: plain and, after a slash, averaged; `values` by tag."""
    losses = {tag.removeprefix("loss/"): value for tag, value in values.items() if tag.startswith("loss/")}
    parts = []
    for name, value in losses.items():
        if name.removesuffix(AVERAGED) not in losses or not name.endswith(AVERAGED):
            average = losses.get(name + AVERAGED)
            parts.append(f"{name} {value:.5f}" + ("" if average is None else f" / {average:.5f}"))
    averaged = any(name + AVERAGED in losses for name in losses)
    return f"validation{' (plain / ema)' if averaged else ''}: {', '.join(parts)}"


def end_summary(
    *,
    outcome: str,
    updates: int,
    images: int,
    seconds: float,
    loss: float | None,
    paths: Mapping[str, object],
) -> str:
    """What a run has done, and where its files are, a line each; `outcome`: finished, interrupted, ..."""
    pace = f", {images / seconds:.3g} images/s" if seconds > 0 and images else ""
    final = "" if loss is None else f", loss {loss:.4f}"
    lines = [f"{outcome}: {updates} updates, {images} images in {duration(seconds)} of training{pace}{final}"]
    width = max((len(name) for name in paths), default=0)
    lines += [f"  {name:<{width}}  {printable(path)}" for name, path in paths.items()]
    return "\n".join(lines)


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
