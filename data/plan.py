"""The epoch as a pure function: one line of visits, cut into equal updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from random import Random
from typing import TypeVar

from data.item import Bucket, Item, MicroBatch, Update, Visit
from utils.seeding import stream

Placed = tuple[Item, Bucket]
T = TypeVar("T")


def plan_epoch(
    items: Sequence[Placed], *, batch_size: int, grad_accum: int, seed: int, epoch: int
) -> tuple[Update, ...]:
    """The updates of `epoch` (from 0) in the order in which they are trained; `()` when nothing is due.

    Every visit is in exactly one update, update sizes differ by at most one, micro-batches hold one bucket and at
    most `batch_size` visits. Which visits form an update depends on `batch_size * grad_accum` only. The order of
    `items` does not matter: they are sorted by id first.
    """
    chance = stream(seed, "plan", epoch)
    line = _line(sorted(items, key=lambda placed: placed[0].id), seed, epoch, chance)
    count = updates_for(len(line), batch_size, grad_accum)
    updates = [
        _update(line[index * len(line) // count : (index + 1) * len(line) // count], batch_size)
        for index in range(count)
    ]
    chance.shuffle(updates)
    return tuple(updates)


def select_rated(
    items: Sequence[Placed], *, target_percent: float, seed: int, epoch: int, epochs: int
) -> tuple[Placed, ...]:
    """The items that `epoch` of `epochs` uses when the data is rated, in the given order.

    The share falls evenly from 1 in the first epoch to 1 - target_percent / 100 in the last. Items are drawn without
    replacement with odds in proportion to their rating: the smallest keys e / rating with e ~ Exp(1) are kept, which
    is Efraimidis and Spirakis' u ^ (1 / rating) (doi 10.1016/j.ipl.2005.11.003) in logarithms.
    """
    kept = rated_count(len(items), target_percent=target_percent, epoch=epoch, epochs=epochs)
    if kept == len(items):
        return tuple(items)
    chance = stream(seed, "rated", epoch).random
    keys: dict[int, float] = {}
    for index in sorted(range(len(items)), key=lambda index: items[index][0].id):
        waiting = -math.log(1.0 - chance())
        rating = items[index][0].rating
        keys[index] = waiting / rating if rating > 0 else math.inf
    chosen = sorted(keys, key=keys.__getitem__)[:kept]
    return tuple(items[index] for index in sorted(chosen))


def rated_count(total: int, *, target_percent: float, epoch: int, epochs: int) -> int:
    """How many of `total` rated items `epoch` of `epochs` uses: at least one, if there is one."""
    progress = min(1.0, epoch / (epochs - 1)) if epochs > 1 else 0.0
    return min(total, max(1, round(total * (1.0 - target_percent / 100.0 * progress))))


def updates_for(visits: int, batch_size: int, grad_accum: int) -> int:
    """The number of updates that so many visits are cut into."""
    return -(-visits // (batch_size * grad_accum))


def count_updates(
    items: Sequence[Placed],
    *,
    batch_size: int,
    grad_accum: int,
    seed: int,
    epochs: int,
    rated_target_percent: float | None = None,
) -> tuple[int, ...]:
    """The updates of each epoch of the run, exactly as `plan_epoch` will cut them, without planning any.

    `rated_target_percent`: the run selects with `select_rated` first; `None` means that all items are used.
    """
    return tuple(
        updates_for(visits, batch_size, grad_accum)
        for visits in count_visits(items, seed=seed, epochs=epochs, rated_target_percent=rated_target_percent)
    )


def count_visits(
    items: Sequence[Placed], *, seed: int, epochs: int, rated_target_percent: float | None = None
) -> tuple[int, ...]:
    """The visits of each epoch of the run (see `count_updates`)."""
    everything = _group_sizes(items)
    counts: list[int] = []
    for epoch in range(epochs):
        used = everything
        if rated_target_percent is not None:
            used = _rated_sizes(items, everything, rated_target_percent, seed, epoch, epochs)
        counts.append(sum(len(_turns(size, multiply, epoch)) for multiply, size in used.items()))
    return tuple(counts)


def epochs_begun(updates: Sequence[int], total: int) -> int:
    """Epochs that a run of `total` updates begins, of those with so many `updates` each."""
    return 1 + sum(end < total for end in accumulate(updates))


def _group_sizes(items: Sequence[Placed]) -> dict[float, int]:
    sizes: dict[float, int] = defaultdict(int)
    for item, _ in items:
        sizes[item.multiply] += 1
    return sizes


def _rated_sizes(
    items: Sequence[Placed], groups: dict[float, int], percent: float, seed: int, epoch: int, epochs: int
) -> dict[float, int]:
    # With one multiplier the number of selected items is enough; only with several does it matter which they are.
    if len(groups) == 1:
        total = rated_count(len(items), target_percent=percent, epoch=epoch, epochs=epochs)
        return dict.fromkeys(groups, total)
    return _group_sizes(select_rated(items, target_percent=percent, seed=seed, epoch=epoch, epochs=epochs))


def _turns(size: int, multiply: float, epoch: int) -> range:
    """The turns that a group of `size` items gets in `epoch`, counted from the start of the run.

    Turn t belongs to the item at place t % size of a fixed order: after k epochs k * size * multiply turns (rounded
    up) have been dealt, and each item has had its share k * multiply within one. The arithmetic is exact, so that
    ten epochs of 0.1 are one.
    """
    share = Fraction(str(multiply)) * size
    return range(math.ceil(epoch * share), math.ceil((epoch + 1) * share))


def _visits(items: Sequence[Placed], seed: int, epoch: int) -> Iterator[Visit]:
    groups: dict[float, list[Placed]] = defaultdict(list)
    for placed in items:
        groups[placed[0].multiply].append(placed)
    for multiply, group in sorted(groups.items()):
        turns = _turns(len(group), multiply, epoch)
        if multiply != int(multiply):
            stream(seed, "multiply", str(multiply)).shuffle(group)
        for turn in turns:
            item, bucket = group[turn % len(group)]
            yield Visit(item, bucket, epoch, (turn - turns.start) // len(group))


def _line(items: Sequence[Placed], seed: int, epoch: int, chance: Random) -> list[Visit]:
    """All visits in a row: shuffled in their bucket, buckets of a named group together, groups in random order."""
    groups: dict[tuple[str, Bucket | None], dict[Bucket, list[Visit]]] = defaultdict(lambda: defaultdict(list))
    for visit in _visits(items, seed, epoch):
        name = visit.item.batch_id
        groups[name, None if name else visit.bucket][visit.bucket].append(visit)
    line: list[Visit] = []
    for group in _shuffled(list(groups.values()), chance):
        for visits in _shuffled(list(group.values()), chance):
            line.extend(_shuffled(visits, chance))
    return line


def _shuffled(things: list[T], chance: Random) -> list[T]:
    chance.shuffle(things)
    return things


def _update(visits: Sequence[Visit], batch_size: int) -> Update:
    """One update: a micro-batch a bucket, or as many equal ones as batch_size asks for."""
    buckets: dict[Bucket, list[Visit]] = defaultdict(list)
    for visit in visits:
        buckets[visit.bucket].append(visit)
    micro_batches: list[MicroBatch] = []
    for bucket, members in buckets.items():
        parts = -(-len(members) // batch_size)
        edges = [part * len(members) // parts for part in range(parts + 1)]
        micro_batches.extend(MicroBatch(bucket, tuple(members[start:stop])) for start, stop in pairwise(edges))
    return Update(tuple(micro_batches))
