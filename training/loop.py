"""The loop: epochs, updates, micro-batches; nothing in here waits for the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from data.batches import Batch
from data.item import Update
from training.between import after_epoch, after_update, before_epoch, before_first_update, write_tables
from training.memory import learn_from_shortage, pieces
from training.session import Session
from training.step import Pass, forward_backward
from utils.logs import LOGGER
from utils.stopping import CutOff


def train(session: Session) -> None:
    """Train until all updates are done or a stop is asked for."""
    before_first_update(session)
    # From here on there is something to save.
    session.stop.at_once = False
    try:
        while not session.finished and not session.stop:
            train_epoch(session)
    except CutOff:
        # The update in hand is as if it had never begun.
        session.updater.discard()
    if session.progress.update_in_epoch > 0:
        write_tables(session)


def train_epoch(session: Session) -> None:
    """Train what is left of the epoch in hand."""
    started = time.perf_counter()
    done = session.progress.update_in_epoch
    updates = session.data.plan(session.progress.epoch)
    before_epoch(session, updates)
    batches = session.batches.epoch(updates, done, session.stop)
    for update in updates[done:]:
        train_update(session, update, batches)
        after_update(session)
        if session.stop or session.finished:
            break
    if session.progress.update_in_epoch < len(updates):
        return
    session.progress = dataclasses.replace(session.progress, epoch=session.progress.epoch + 1, update_in_epoch=0)
    after_epoch(session, seconds=None if done else time.perf_counter() - started)


def train_update(session: Session, update: Update, batches: Iterator[Batch]) -> None:
    """One change of the weights: a forward and backward pass for each micro-batch, then the step."""
    started = time.perf_counter()
    done = session.progress.update
    passes = accumulate(session, update, batches)
    session.last = session.updater.step(done)
    if session.ema is not None:
        session.ema.update(done + 1, session.trained())
    progress = session.progress
    session.progress = dataclasses.replace(
        progress,
        update=done + 1,
        update_in_epoch=progress.update_in_epoch + 1,
        images=progress.images + update.images,
        seconds=progress.seconds + time.perf_counter() - started,
    )
    session.bar.advance()
    # Last, for it may end the run: by now weights and counts agree.
    note(session, done + 1, passes)


def accumulate(session: Session, update: Update, batches: Iterator[Batch]) -> list[Pass]:
    """The gradients of all micro-batches of `update`.

    When memory runs out, all of them are dropped and made anew from the same draws, with smaller micro-batches.

    Raises:
        OutOfMemoryError: not even one image fits.
    """
    taken: list[Batch] = []
    while True:
        passes: list[Pass] = []
        try:
            for number in range(len(update.micro_batches)):
                if number == len(taken):
                    taken.append(take(session, batches))
                last_batch = number + 1 == len(update.micro_batches)
                for piece, last_piece in pieces(session, taken[number]):
                    passes.append(forward_backward(session, piece, update.images, last=last_batch and last_piece))
            return passes
        except RuntimeError as error:
            if not session.device.out_of_memory(error):
                raise
            learn_from_shortage(session, taken[-1] if number + 1 == len(taken) else taken[number])
            session.updater.discard()


def take(session: Session, batches: Iterator[Batch]) -> Batch:
    """The next batch. An error of the workers that comes while the run is stopping is the stop, and no failure.

    Raises:
        CutOff: in its place.
    """
    try:
        return next(batches)
    except Exception as error:
        if not session.stop:
            raise
        LOGGER.info("the update in hand is left, for no more batches come: %s", str(error))
        raise CutOff from error


def note(session: Session, number: int, passes: list[Pass]) -> None:
    """Remember what the update `number` was made of, for the logs."""
    assert session.last is not None
    ids: list[str] = []
    captions: list[str] = []
    for one in passes:
        session.window.add(one.total, len(one.batch.visits))
        session.epoch_meter.add(one.total, len(one.batch.visits))
        names = [visit.item.id for visit in one.batch.visits]
        heard = [name if text else None for name, text in zip(names, one.batch.captions, strict=True)]
        session.ledger.add(heard, one.losses, one.batch.draws.timesteps)
        ids += names
        captions += one.batch.captions
        for visit, reason in one.batch.failures:
            session.note_failure(visit, reason)
    session.captions = tuple(captions)
    if number == 1:
        session.first_batches = tuple(one.batch for one in passes)
    session.unread.append((number, tuple(ids), session.last.applied))
