"""What happens between updates: scalars, samples, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from training.session import Session
from utils.logs import LOGGER
from utils.writer import SaveResult

if TYPE_CHECKING:
    from torch import Tensor


def before_first_update(session: Session) -> None:
    """Samples of the model as it came; where the file has no prompts, of what is trained first."""
    if session.progress.update == 0:
        session.captions = session.data.captions(session.data.plan(0)[0])
        draw_samples(session)


def after_update(session: Session) -> None:
    """What is due after the update that `session.progress` counts last."""
    update = session.progress.update
    if update % session.options.log.log_step == 0 or session.finished:
        log_scalars(session)
    draw_samples(session)
    report_saves(session, session.writer.poll())
    if not session.finished and session.timetable.due_after_update(session.progress.epoch):
        with left_out(session):
            session.save()


def after_epoch(session: Session, *, seconds: float, images: int) -> None:
    """What is due when an epoch is complete; `seconds` and `images` are those of the epoch."""
    reading = session.epoch_meter.read()
    values = {"loss/epoch": reading.loss, "performance/minutes per epoch": seconds / 60}
    session.tracker.scalars(session.progress.update, values)
    LOGGER.info("epoch %d: loss %.4f, %d images", session.progress.epoch, reading.loss, images)
    if not session.finished and session.timetable.due_after_epoch(session.progress.epoch):
        with left_out(session):
            session.save()


def log_scalars(session: Session) -> None:
    """Report the state of the training; reading the numbers waits for the device."""
    reading = session.window.read()
    session.last_loss = reading.loss
    last = session.last
    assert last is not None
    values = {"loss/log_step": reading.loss, "performance/images per second": reading.images_per_second}
    for name, label, short in (("unet", "unet", "unet"), ("text_encoder", "text encoder", "te")):
        if name in last.rates:
            values[f"hyperparameter/lr {label}"] = last.rates[name]
            if session.log_grad_norm:
                values[f"optimizer/{short}_grad_norm"] = last.clipped_norms[name].item()
                values[f"optimizer/{short}_pre_clip_norm"] = last.grad_norms[name].item()
    if session.updater.loss_scale is not None:
        values["hyperparameter/grad scale"] = session.updater.loss_scale.scale.item()
    memory = session.device.memory_gib()
    if memory is not None:
        values["performance/vram"] = memory[0]
    session.tracker.scalars(session.progress.update, values)
    session.bar.show(
        epoch=session.progress.epoch + 1,
        loss=reading.loss,
        lr=next(iter(last.rates.values())),
        images_per_second=reading.images_per_second,
        memory_gib=memory,
    )
    report_skipped(session)


def report_skipped(session: Session) -> None:
    """Say when updates were skipped because loss or gradients were not finite."""
    total, in_row = session.updater.skipped()
    if total > session.skipped_told:
        LOGGER.warning(
            "%d updates skipped so far, %d in a row: loss or gradients were not finite; no weight was changed",
            total,
            in_row,
        )
        session.skipped_told = total


def draw_samples(session: Session) -> None:
    """Samples, if they are due: from the average by default when there is one."""
    if not session.gallery.plan.due(session.progress.update):
        return
    versions: dict[str, Mapping[str, Mapping[str, Tensor]]] = {}
    averages, ema = session.averages(), session.options.ema
    if averages is None or ema.ema_sample_nonema_model:
        versions[""] = session.answers()
    # With neither flag it is the average alone, which is what the user will use.
    if averages is not None and (ema.ema_sample_ema_model or not ema.ema_sample_nonema_model):
        versions["ema"] = averages
    with left_out(session):
        pictures = session.gallery.draw(session.progress.update, session.captions, versions)
    if pictures:
        LOGGER.info("%d samples after update %d in %s", len(pictures), session.progress.update, session.run.samples)


def report_saves(session: Session, results: list[SaveResult]) -> None:
    """Say what became of saves: failures were told by the writer."""
    for result in results:
        if result.folder is not None:
            LOGGER.info(
                "saved %s (waited %.1f s, written in %.1f s)",
                result.folder,
                result.wait_seconds,
                result.write_seconds,
            )


@contextmanager
def left_out(session: Session) -> Iterator[None]:
    """Keep what happens inside out of the images per second."""
    started = time.perf_counter()
    yield
    session.window.leave_out(time.perf_counter() - started)
