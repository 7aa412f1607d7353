"""The loop: epochs, updates, micro-batches; nothing in here waits for the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from data.batches import Batch
from data.item import Update
from optimizer.objective import diffusion_step
from training.between import after_epoch, after_update, before_first_update
from training.session import Session
from utils.models import tokenize


def train(session: Session) -> None:
    """Train until all updates are done or a stop is asked for."""
    before_first_update(session)
    while not session.finished and not session.stop:
        train_epoch(session)


def train_epoch(session: Session) -> None:
    """Train what is left of the epoch in hand."""
    started, images_before = time.perf_counter(), session.progress.images
    done = session.progress.update_in_epoch
    updates = session.data.plan(session.progress.epoch)
    batches = session.batches.epoch(updates, done)
    for update in updates[done:]:
        train_update(session, update, batches)
        after_update(session)
        if session.stop or session.finished:
            break
    if session.progress.update_in_epoch < len(updates):
        return
    session.progress = dataclasses.replace(session.progress, epoch=session.progress.epoch + 1, update_in_epoch=0)
    after_epoch(session, seconds=time.perf_counter() - started, images=session.progress.images - images_before)


def train_update(session: Session, update: Update, batches: Iterator[Batch]) -> None:
    """One change of the weights: a forward and backward pass for each micro-batch, then the step."""
    started = time.perf_counter()
    done = session.progress.update
    captions: list[str] = []
    for number, _ in enumerate(update.micro_batches, start=1):
        batch = next(batches)
        captions += batch.captions
        _forward_backward(session, batch, update, last=number == len(update.micro_batches))
    session.last = session.updater.step(done)
    if session.ema is not None:
        session.ema.update(done + 1, session.trained())
    session.captions = tuple(captions)
    progress = session.progress
    session.progress = dataclasses.replace(
        progress,
        update=done + 1,
        update_in_epoch=progress.update_in_epoch + 1,
        images=progress.images + update.images,
        seconds=progress.seconds + time.perf_counter() - started,
    )
    session.bar.advance()


def _forward_backward(session: Session, batch: Batch, update: Update, *, last: bool) -> None:
    device = session.device.torch_device
    input_ids = tokenize(session.models, batch.captions).to(device, non_blocking=True)
    batch = batch.to(device, non_blocking=True)
    losses = diffusion_step(session.networks, session.objective, batch.pixels, input_ids, batch.draws)
    session.updater.backward(losses, batch.loss_scale, update.images, done=session.progress.update, last=last)
    total = losses.detach().sum()
    session.window.add(total, len(batch.visits))
    session.epoch_meter.add(total, len(batch.visits))
