"""What happens between updates: scalars, samples, validation, checkpoints, wishes of the user."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.item import Update
from data.lengths import full_text
from data.schedule import write_schedule
from training.parts import losses_of_probe
from training.rehearsal import foresee_saves, rehearse
from training.session import Session
from training.settings import reload_settings
from utils.borrow import undisturbed, weights_swapped
from utils.console import validation_line
from utils.contact_sheet import contact_sheet
from utils.errors import UserError
from utils.logs import LOGGER
from utils.stopping import CutOff
from utils.writer import SaveResult

if TYPE_CHECKING:
    from torch import Tensor


def before_first_update(session: Session) -> None:
    """What is tried and shown before anything is trained: memory, samples and losses of the model as it came."""
    if session.device.is_cuda:
        rehearse(session)
    foresee_saves(session)
    if session.progress.update == 0:
        session.captions = session.data.captions(session.data.plan(0)[0])
        draw_samples(session)
        validate(session)
    due, session.cut_off = session.cut_off, set()
    if "samples" in due:
        draw_samples(session, asked=True)
    if "validation" in due:
        validate(session)


def before_epoch(session: Session, updates: Sequence[Update]) -> None:
    """What is due before an epoch of `updates`, or before what is left of it."""
    progress = session.progress
    if progress.update_in_epoch == 0 and progress.epoch > 0 and session.options.run.load_settings_every_epoch:
        reload_settings(session)
    if session.options.data.write_schedule:
        first = progress.update - progress.update_in_epoch
        with surviving("the batch schedule"):
            write_schedule(session.run.folder, progress.epoch, updates, session.data.caption, first_update=first)


def after_update(session: Session) -> None:
    """What is due after the update that `session.progress` counts last."""
    update = session.progress.update
    show_first_update(session)
    if update % session.options.log.log_step == 0 or session.finished:
        log_scalars(session)
    draw_samples(session)
    if update in session.data.validation:
        validate(session)
    report_saves(session, session.writer.poll())
    if not session.finished and session.timetable.due_after_update(session.progress.epoch):
        save(session)
    obey(session)


def after_epoch(session: Session, *, seconds: float | None) -> None:
    """What is due when an epoch is complete; `seconds` it took, `None` when the run went on in the midst of it."""
    reading = session.epoch_meter.read()
    values = {"loss/epoch": reading.loss}
    if seconds is not None:
        values["performance/minutes per epoch"] = seconds / 60
    session.tracker.scalars(session.progress.update, values)
    LOGGER.info("epoch %d: loss %.4f, %d images", session.progress.epoch, reading.loss, reading.images)
    write_tables(session)
    if not session.finished and session.timetable.due_after_epoch(session.progress.epoch):
        save(session)


def write_tables(session: Session) -> None:
    """What was noted of every image so far."""
    captions = {item.id: full_text(item) for item, _ in session.data.placed}
    with surviving("the loss ledger"):
        session.ledger.write(session.run.folder, captions)
    session.tracker.histogram("timesteps", *session.ledger.histogram(), session.progress.update)


def show_first_update(session: Session) -> None:
    """The first pictures that the model was given, as it saw them, with their captions."""
    if session.first_batches:
        batches, session.first_batches = session.first_batches, ()
        pictures = [picture for batch in batches for picture in batch.pixels.cpu()]
        captions = [caption for batch in batches for caption in batch.captions]
        with surviving("the picture of the first update"):
            session.tracker.image("first_update", contact_sheet(pictures, captions), session.progress.update)


def save(session: Session) -> None:
    """A checkpoint, written while the training goes on."""
    with left_out(session):
        session.save()


def obey(session: Session) -> None:
    """Do what the control file asks for; "pause" waits here for the next word."""
    commands = session.control.poll()
    while commands:
        command = commands.pop(0)
        if command == "save":
            save(session)
        elif command == "sample":
            draw_samples(session, asked=True)
        elif command == "validate":
            validate(session)
        elif command == "stop":
            session.stop.request()
        elif command == "pause":
            LOGGER.info("paused; write resume into %s to go on", session.run.control)
            with left_out(session):
                while not commands and not session.stop:
                    commands = session.control.wait()


def log_scalars(session: Session) -> None:
    """Report the state of the training; reading the numbers waits for the device."""
    reading = session.window.read()
    session.ledger.collect()
    session.last_loss = reading.loss
    last = session.last
    assert last is not None
    values = {"loss/log_step": reading.loss, "performance/images per second": reading.images_per_second}
    for name, label, short in (("unet", "unet", "unet"), ("text_encoder", "text encoder", "te")):
        if name in last.rates:
            values[f"hyperparameter/lr {label}"] = last.rates[name]
            if session.inputs.optimizer.values.log_grad_norm:
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
    """Name the images of updates that were skipped because loss or gradients were not finite.

    Raises:
        UserError: `max_bad_updates` of them in a row; the weights are still those of the last good update.
    """
    total, in_row = session.updater.skipped()
    unread, session.unread = session.unread, []
    # fp16 finds its loss scale by skipping a few; that is no news.
    quiet = session.updater.loss_scale is not None and in_row < session.options.optimizer.max_bad_updates
    if total > session.skipped_told and not quiet:
        for number, ids, applied in unread:
            if not applied:
                LOGGER.warning(
                    "update %d was skipped, no weight was changed: loss or gradients not finite; images: %s",
                    number,
                    ", ".join(ids),
                )
    session.skipped_told = total
    if in_row >= session.options.optimizer.max_bad_updates:
        raise UserError(
            f"{in_row} updates in a row had a loss or gradients that are not finite (max_bad_updates = "
            f"{session.options.optimizer.max_bad_updates}); lower lr, set clip_grad_norm, or look at the images that "
            "the log names. No weight was changed by them, and all is saved: --resume_ckpt findlast goes on"
        )


def draw_samples(session: Session, *, asked: bool = False) -> None:
    """Samples, if they are due or asked for: from the average by default when there is one."""
    if not asked and not session.gallery.plan.due(session.progress.update, finished=session.finished):
        return
    versions: dict[str, Mapping[str, Mapping[str, Tensor]]] = {}
    averages, ema = session.averages(), session.options.ema
    if averages is None or ema.ema_sample_nonema_model:
        versions[""] = session.answers()
    # With neither flag it is the average alone, which is what the user will use.
    if averages is not None and (ema.ema_sample_ema_model or not ema.ema_sample_nonema_model):
        versions["ema"] = averages
    pictures: list[Path] = []
    with left_out(session), cut_off_by_stop(session, "samples"):
        pictures = session.gallery.draw(session.progress.update, session.captions, versions)
    if pictures:
        word = "sample" if len(pictures) == 1 else "samples"
        LOGGER.info("%d %s after update %d in %s", len(pictures), word, session.progress.update, session.run.samples)


def validate(session: Session) -> None:
    """A validation pass with the plain weights, and one with the average."""
    if session.validation is None:
        return
    models, device, update = session.models, session.device, session.progress.update
    loss_of = partial(losses_of_probe, models, session.networks, session.objective, device)
    values: dict[str, float] = {}
    before = session.validation.state()
    with (
        surviving("validation"),
        left_out(session),
        cut_off_by_stop(session, "validation"),
        undisturbed(models.unet, models.text_encoder, models.vae, device=device.torch_device),
    ):
        for label, weights in (("", session.answers()), ("ema", session.averages())):
            if weights is not None:
                with ExitStack() as stack:
                    for name, tensors in weights.items():
                        stack.enter_context(weights_swapped(getattr(models, name), tensors))
                    values |= session.validation.run(update, loss_of, label=label)
    if "validation" in session.cut_off:
        # The pass will come again as a whole; half of it must not count twice.
        session.validation.load_state(before)
    elif values:
        session.tracker.scalars(update, values)
        line = validation_line(values)
        LOGGER.info("%s", line)


@contextmanager
def cut_off_by_stop(session: Session, what: str) -> Iterator[None]:
    """Leave what happens inside, at its next pass through a network, once a stop is asked for.

    A sheet of samples may take minutes, and who sends SIGTERM seldom waits that long. What was cut off is noted, so
    that the run does it when it goes on.
    """

    def look(*_: object) -> None:
        if session.stop:
            raise CutOff

    vae = session.models.vae
    hooks = [part.register_forward_pre_hook(look) for part in (session.models.unet, vae.encoder, vae.decoder)]
    try:
        yield
    except CutOff:
        session.cut_off.add(what)
        LOGGER.info("%s after update %d: left out, the run is stopping", what, session.progress.update)
    finally:
        for hook in hooks:
            hook.remove()


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
    try:
        yield
    finally:
        session.window.leave_out(time.perf_counter() - started)


@contextmanager
def surviving(what: str) -> Iterator[None]:
    """Go on when something that only looks on fails: a disk that is full, a pass that does not fit into memory."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is, it has not touched what is being trained
        foreseen = isinstance(error, OSError | RuntimeError)
        LOGGER.warning("%s failed, the training goes on: %s", what, str(error), exc_info=not foreseen)
