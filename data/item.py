"""The nouns of the data: items and their captions, buckets, visits, micro-batches (frozen, no pixels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Bucket(NamedTuple):
    """The size in pixels that a group of images is cut to."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Tag:
    """A part of a caption that may be shuffled or, by weight, left out."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Caption:
    """A main prompt and tags, rendered `main, tag1, tag2`.

    Args:
        main_prompt: stays first, whatever is shuffled. May be empty.
        tags: in the order of the files, most specific first.
        max_length: characters that weighted tags may fill; `None` is no limit.
    """

    main_prompt: str
    tags: tuple[Tag, ...] = ()
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """An image with its caption and settings.

    Args:
        id: the path relative to its data root, with `/`; it names the item's random streams.
        path: the file to open.
        width, height: pixels, after EXIF orientation has been applied.
        multiply: visits per epoch; a fraction is shared fairly over the epochs.
        rating: odds of being kept by a rated data set.
        batch_id: images of one id stand together in the line of the epoch; "" is the unnamed group.
        loss_scale: factor on the loss of this image.
        cond_dropout, flip_p, shuffle_tags: `None` takes the option's value.
    """

    id: str
    path: str
    width: int
    height: int
    caption: Caption
    multiply: float = 1.0
    rating: float = 1.0
    batch_id: str = ""
    loss_scale: float = 1.0
    cond_dropout: float | None = None
    flip_p: float | None = None
    shuffle_tags: bool | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """One use of an item in an epoch; `repeat` counts the uses of the same item from 0."""

    item: Item
    bucket: Bucket
    epoch: int
    repeat: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Visits of one bucket that go through the networks together."""

    bucket: Bucket
    visits: tuple[Visit, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """The micro-batches between one change of the weights and the next."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def images(self) -> int:
        """Number of images, the divisor of the update's loss."""
        return sum(len(micro_batch.visits) for micro_batch in self.micro_batches)
