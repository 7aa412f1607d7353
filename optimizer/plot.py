"""The learning rates of a run as a plot of characters, for the dry run."""

from __future__ import annotations

from collections.abc import Callable

from optimizer.settings import PartSettings, schedule_of
from utils.optimizer_names import PARAMETERS

WIDTH, HEIGHT = 64, 8


def rate_lines(name: str, settings: PartSettings, updates: int) -> list[str]:
    """A heading and the plot of the learning rate over a run of `updates`."""
    optimizer = settings.optimizer or "adamw"
    if "lr" not in PARAMETERS[optimizer]:
        return [f"{name}: {optimizer} has no learning rate"]
    schedule = schedule_of(settings, updates)
    heading = f"{name}: lr {settings.lr:.3g}, {schedule.name}"
    if schedule.name == "constant":
        return [heading]
    if schedule.name != "constant_with_warmup":
        heading += f" over {schedule.decay} updates"
    heading += f", warmup {schedule.warmup}"
    return [heading, *plot(lambda done: settings.lr * schedule.factor(done), updates)]


def plot(rate: Callable[[int], float], updates: int, *, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """The values of `rate` at 0 .. `updates` - 1 as lines of text: top to bottom, labelled at the edges."""
    columns = min(width, updates)
    places = [round(column * (updates - 1) / max(1, columns - 1)) for column in range(columns)]
    values = [rate(place) for place in places]
    top = max(values)
    rows = [round((height - 1) * value / top) if top > 0 else 0 for value in values]
    lines = []
    for row in reversed(range(height)):
        label = f"{top:9.2e}" if row == height - 1 else (f"{0:9.2e}" if row == 0 else " " * 9)
        marks = "".join("*" if level == row else " " for level in rows)
        lines.append(f"  {label} |{marks}".rstrip())
    lines.append(f"  {'':9} +{'-' * columns}")
    last = f" {updates - 1}"
    lines.append(f"  {'update':>9}  0{last:>{columns - 1}}")
    return lines
