"""Whether an unfinished run can go on under the options, data and libraries of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.checkpoint import Record
from utils.errors import UserError, printable
from utils.logs import LOGGER
from utils.options import flat
from utils.resume import compare_resume

# These may change when a run goes on: where files lie and what is shown, and what a user turns while training. They
# are listed. Every other option decides which pictures, draws and weights are meant, so a change of it is an error.
LISTED = """
    hub_revision hub_variant model_config model_ema prediction_type data_index check_data write_schedule background
    max_bad_updates trigger_words
    config project_name run_name logdir dry_run load_settings_every_epoch max_epochs max_steps
    resume_ckpt resume_mode attn_type gradient_checkpointing clip_skip
    data_root num_workers worker_start cond_dropout flip_p crop_jitter shuffle_tags keep_tags
    zero_frequency_noise_ratio pyramid_noise_discount embedding_perturbation input_perturbation
    loss_type min_snr_gamma loss_weighting
    optimizer_config lr lr_scheduler lr_decay_steps lr_warmup_steps scale_lr clip_grad_norm
    ema_decay_rate ema_strength_target ema_update_interval ema_device ema_resume_model
    ema_sample_nonema_model ema_sample_ema_model sample_prompts sample_steps
    save_ckpt_dir ckpt_every_n_minutes save_every_n_epochs save_ckpts_from_n_epochs save_full_precision save_optimizer
    no_save_ckpt no_prepend_last keep_last_n log_step validation_config wandb device gpuid deterministic
""".split()
# Where a run is read from says nothing about it.
_SILENT = ("options.config", "options.resume_ckpt", "options.resume_mode", "options.dry_run", "options.seed")


def check_resume(record: Record, options: Mapping[str, Any], versions: Mapping[str, str], fingerprint: str) -> None:
    """Log what has changed since `record` was saved.

    Raises:
        UserError: the run would not mean the same any more; says what has changed and how to go on.
    """
    saved = {
        "options": {**record.extra["options"], "seed": record.seed},
        "versions": record.versions,
        "data": record.extra["data"],
    }
    now = {"options": options, "versions": versions, "data": fingerprint}
    harmless = ["versions.*", *(f"options.{name}" for name in LISTED)]
    listed, breaking = compare_resume(saved, now, harmless)
    if breaking:
        shown = "; ".join(
            "the pictures or their captions" if change.key == "data" else str(change).removeprefix("options.")
            for change in breaking
        )
        raise UserError(
            f"{printable(record.name)} cannot go on exactly, because this has changed: {shown}. "
            "Put it back as it was, or start a new run from the weights with --resume_mode weights"
        )
    for change in listed:
        if change.key not in _SILENT:
            LOGGER.info("changed since %s: %s", record.name, str(change).removeprefix("options."))


def resolved(options: Any, seed: int) -> dict[str, Any]:
    """Flat options with the seed that the run has."""
    return {**flat(options), "seed": seed}
