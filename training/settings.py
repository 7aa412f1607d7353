"""Settings read again while a run goes on: what can change does, what cannot is said."""

from __future__ import annotations

import dataclasses
from typing import Any

from training.parts import build_batches, build_networks, build_run_objective
from training.resuming import resolved
from training.session import Session
from utils.errors import ProblemsError
from utils.logs import LOGGER
from utils.options import flat, reload_options, replace
from utils.saving import Retention

# What takes effect at the next epoch. Everything else belongs to the plan of the run or to what is built once.
LIVE = frozenset(
    """
    clip_skip cond_dropout flip_p crop_jitter shuffle_tags keep_tags write_schedule
    zero_frequency_noise_ratio pyramid_noise_discount embedding_perturbation input_perturbation
    loss_type min_snr_gamma loss_weighting
    ckpt_every_n_minutes save_every_n_epochs save_ckpts_from_n_epochs save_full_precision save_optimizer
    no_save_ckpt no_prepend_last trigger_words keep_last_n save_ckpt_dir log_step max_bad_updates
    ema_sample_nonema_model ema_sample_ema_model load_settings_every_epoch
    """.split()
)


def reload_settings(session: Session) -> None:
    """Read the options file again and put into force what can change; a broken file changes nothing."""
    try:
        loaded = reload_options(session.inputs.loaded)
    except ProblemsError as error:
        LOGGER.warning("the options file is left aside, nothing has changed: %s", str(error))
        return
    old, new = flat(session.inputs.options), flat(loaded.options)
    session.inputs = dataclasses.replace(session.inputs, loaded=loaded)
    changes = {}
    for name in (name for name in new if new[name] != old[name]):
        if name in LIVE and not _turns_zero_snr(name, old[name], new[name]):
            LOGGER.info("setting %s: %s -> %s", name, old[name], new[name])
            changes[name] = new[name]
        else:
            LOGGER.warning("setting %s: %s -> %s takes effect with the next start", name, old[name], new[name])
    if changes:
        apply_settings(session, changes)


def _turns_zero_snr(name: str, old: Any, new: Any) -> bool:
    """-1 is another noise schedule, which a model cannot change on the way."""
    return name == "zero_frequency_noise_ratio" and -1 in (old, new)


def apply_settings(session: Session, changes: dict[str, Any]) -> None:
    """Rebuild the parts that look at `changes`, values by option."""
    session.options = options = replace(session.options, **changes)
    session.data = dataclasses.replace(session.data, options=options.data)
    session.networks = build_networks(session.models, options, session.device)
    session.objective = build_run_objective(session.models, options, session.device)
    session.gallery.clip_skip = options.model.clip_skip
    session.timetable.options = options.save
    session.archive.save = options.save
    session.archive.options = resolved(options, session.seed)
    session.writer.retention = Retention(options.save.keep_last_n, options.save.save_optimizer)
    if changes.keys() & WORKERS:
        session.batches.close()
        session.batches = build_batches(session.models, options, session.data, session.device)


# These live in the worker processes.
WORKERS = frozenset(
    """
    cond_dropout flip_p crop_jitter shuffle_tags keep_tags
    zero_frequency_noise_ratio pyramid_noise_discount embedding_perturbation input_perturbation
    """.split()
)
