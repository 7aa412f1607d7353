"""The loss ledger: which images the model finds hard, gathered while training without waiting for the device."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from utils.errors import printable
from utils.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

BY_IMAGE = "loss_by_image.csv"
BY_FOLDER = "loss_by_folder.csv"
TIMESTEPS = 1000
BINS = 25
# The usual loss of a bin follows the training: the last so many losses count.
MEMORY = 200
_TINY = 1e-12


@dataclass(slots=True)
class Usual:
    """Mean and spread of the logarithm of the loss in one range of timesteps, of late."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def surprise(self, value: float) -> float:
        """How many standard deviations `value` is above the usual, of which it is then a part itself.

        So the first values of a range count too, and for no more than they tell: of n values, none lies further than
        the root of n - 1 deviations from the mean of them all. Seen from two before it alone, one could lie anywhere.
        """
        self.count = min(self.count + 1, MEMORY)
        step = (value - self.mean) / self.count
        self.variance += ((value - self.mean) * (value - self.mean - step) - self.variance) / self.count
        self.mean += step
        deviation = math.sqrt(self.variance)
        above = (value - self.mean) / deviation if deviation > 0 else 0.0
        return max(-3.0, min(3.0, above))


@dataclass(slots=True)
class Account:
    """What is known of one image."""

    visits: int = 0
    surprise: float = 0.0
    loss: float = 0.0
    # Visits by what they could tell: the first one in a range of timesteps tells nothing.
    telling: float = 0.0


@dataclass(slots=True)
class Ledger:
    """Running losses by image. `add` costs no synchronisation; `collect` reads what has gathered, at log time."""

    accounts: dict[str, Account] = field(default_factory=dict)
    usual: list[Usual] = field(default_factory=lambda: [Usual() for _ in range(BINS)])
    timesteps: list[int] = field(default_factory=lambda: [0] * BINS)
    _ids: list[str | None] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _timesteps: list[Tensor] = field(default_factory=list)

    def add(self, ids: Sequence[str | None], losses: Tensor, timesteps: Tensor) -> None:
        """Note the `losses` (B,) of a micro-batch at `timesteps` (B,), where they are; `None` for a dropped caption.

        A visit without its caption says little about the image, so only its timestep counts.
        """
        assert len(ids) == len(losses) == len(timesteps)
        self._ids += ids
        self._losses.append(losses.detach())
        self._timesteps.append(timesteps)

    def collect(self) -> None:
        """Read what has gathered since the last time."""
        if not self._ids:
            return
        import torch

        both = torch.stack([torch.cat(self._losses).float(), torch.cat(self._timesteps).float()])
        losses, timesteps = both.cpu().tolist()
        for id, loss, timestep in zip(self._ids, losses, timesteps, strict=True):
            self._enter(id, loss, int(timestep))
        self._ids, self._losses, self._timesteps = [], [], []

    def _enter(self, id: str | None, loss: float, timestep: int) -> None:
        place = min(BINS - 1, timestep * BINS // TIMESTEPS)
        self.timesteps[place] += 1
        if id is None or not math.isfinite(loss):
            return
        account = self.accounts.setdefault(id, Account())
        account.visits += 1
        account.loss += (loss - account.loss) / account.visits
        # The logarithm takes out the size of the loss at a timestep, with any weight on it; the spread its reliability.
        usual = self.usual[place]
        above = usual.surprise(math.log(max(loss, _TINY)))
        # A value moves the mean of n by an n-th of its own distance, so only the rest of the distance is seen.
        telling = 1 - 1 / usual.count
        account.telling += telling
        if account.telling > 0:
            account.surprise += (above - telling * account.surprise) / account.telling

    def hardest(self) -> list[tuple[str, Account]]:
        """The images by how far their losses are above the usual, the furthest first.

        Means of few visits are drawn towards 0, as if each image had come two more times as an ordinary one.
        """
        return sorted(self.accounts.items(), key=lambda pair: (-_shrunk(pair[1]), pair[0]))

    def histogram(self) -> tuple[list[int], list[float]]:
        """How often each range of timesteps was trained, and the edges of the ranges."""
        return list(self.timesteps), [TIMESTEPS * edge / BINS for edge in range(BINS + 1)]

    def write(self, folder: Path, captions: Mapping[str, str]) -> None:
        """Write both tables into `folder`; `captions` by id. Raises `OSError`."""
        self.collect()
        images = [("score", "visits", "mean loss", "image", "caption")]
        for id, account in self.hardest():
            images.append(
                (
                    f"{_shrunk(account):+.3f}",
                    str(account.visits),
                    f"{account.loss:.5f}",
                    _cell(id),
                    _cell(captions.get(id, "")),
                )
            )
        write_text(folder / BY_IMAGE, _csv(images))
        write_text(folder / BY_FOLDER, _csv(self._folder_rows()))

    def _folder_rows(self) -> list[tuple[str, ...]]:
        folders: dict[str, list[Account]] = defaultdict(list)
        for id, account in self.accounts.items():
            folders[str(PurePosixPath(id).parent)].append(account)
        rows = []
        for name, accounts in folders.items():
            visits = sum(account.visits for account in accounts)
            telling = sum(account.telling for account in accounts)
            score = sum(account.surprise * account.telling for account in accounts) / telling if telling else 0.0
            loss = sum(account.loss * account.visits for account in accounts) / visits
            rows.append((score, name, len(accounts), visits, loss))
        rows.sort(key=lambda row: (-row[0], row[1]))
        return [
            ("score", "images", "visits", "mean loss", "folder"),
            *((f"{s:+.3f}", str(n), str(v), f"{loss:.5f}", _cell(name)) for s, name, n, v, loss in rows),
        ]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know: plain JSON values."""
        self.collect()
        return {
            "accounts": {id: [a.visits, a.surprise, a.loss, a.telling] for id, a in self.accounts.items()},
            "usual": [[u.count, u.mean, u.variance] for u in self.usual],
            "timesteps": list(self.timesteps),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; in older ones, of three values an account, all visits count alike."""
        self.accounts = {id: Account(*[*values, values[0]][:4]) for id, values in state["accounts"].items()}
        self.usual = [Usual(*values) for values in state["usual"]]
        self.timesteps = list(state["timesteps"])


def _shrunk(account: Account) -> float:
    return account.surprise * account.telling / (account.telling + 2)


def _cell(text: str) -> str:
    """`text` that a spreadsheet takes for text: captions come from strangers, and `=` begins a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
