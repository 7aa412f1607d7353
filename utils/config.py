"""Every option of train.py, once: a frozen dataclass per section, a line an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.schema import option


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Run: what this run is and how long it goes on."""

    config: str = option("train.json", "options file; flags on the command line win over it")
    project_name: str = option("myproj", "names the run folder and the checkpoints")
    run_name: str | None = option(None, "a name for this run in TensorBoard and W&B")
    logdir: str = option("logs", "folder of the run folders")
    seed: int = option(555, "data order, noise and samples; -1 picks one, logs it and saves it", low=-1, high=2**63 - 1)
    max_epochs: int = option(300, "epochs to train", low=1)
    max_steps: int | None = option(None, "updates to train, if they come before max_epochs", low=1)
    dry_run: bool = option(False, "show the resolved options, the data and the plan, then stop; loads no model")
    load_settings_every_epoch: bool = option(False, "read the options file again at every epoch")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Model: what is trained."""

    resume_ckpt: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Diffusers folder, .safetensors or .ckpt file, Hugging Face id, a checkpoint of ours, or findlast",
    )
    hub_revision: str | None = option(None, "branch, tag or commit of a Hugging Face id; not given: main")
    hub_variant: str | None = option(None, "variant of a Hugging Face id or Diffusers folder, such as fp16")
    model_config: str | None = option(None, "folder or Hugging Face id whose configurations describe a single file")
    model_ema: bool = option(False, "take the averaged UNet of a single file that holds both")
    prediction_type: str | None = option(
        None, "what the UNet answers with, where the files say it wrongly", choices=("epsilon", "v_prediction")
    )
    resume_mode: str = option(
        "auto",
        "exact goes on with an unfinished run; weights starts a new run from its weights; auto: exact if unfinished",
        choices=("auto", "exact", "weights"),
    )
    disable_unet_training: bool = option(False, "leave the UNet as it is")
    disable_textenc_training: bool = option(False, "leave the text encoder as it is")
    clip_skip: int = option(
        0,
        "0 and 1: last hidden state of the text encoder; n: n-th from the end. 2 suits many SD1 models",
        low=0,
        high=4,
    )
    attn_type: str = option("sdp", "how attention is computed", choices=("sdp", "xformers", "slice"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Data: what is learned from."""

    data_root: Any = option("input", "folder of captioned pictures, manifest, or a list of them; see docs/data.md")
    resolution: int = option(512, "side of a square picture; other shapes keep its area", low=64, high=2048)
    bucket_step: int = option(64, "sides of the buckets are multiples of it", low=8, high=64)
    buckets: str = option(
        "computed", "fitted: as many, chosen for these pictures to lose the least area", choices=("computed", "fitted")
    )
    batch_size: int = option(2, "images in a forward pass; a tenth of the pictures at most is advisable", low=1)
    grad_accum: int = option(1, "an update takes batch_size times this many images", low=1)
    cond_dropout: float = option(0.04, "share of visits trained with the empty caption", low=0, high=1)
    flip_p: float = option(
        0.0, "chance of a horizontal flip; not for faces or captions with left and right", low=0, high=1
    )
    crop_jitter: float = option(
        0.02, "most that is cut at random from a side, as a share of the short side", low=0, high=0.5
    )
    shuffle_tags: bool = option(False, "shuffle the tags after the main prompt, in a new order at every visit")
    keep_tags: int = option(0, "the first so many tags after the main prompt stay in place", low=0)
    rated_dataset: bool = option(False, "use fewer pictures from epoch to epoch, the best rated the longest")
    rated_dataset_target_dropout_percent: int = option(
        50, "share of the pictures that a rated data set leaves out in its last epoch", low=0, high=100
    )
    background: str = option("white", "what shows through transparent pictures", choices=("white", "black", "grey"))
    write_schedule: bool = option(False, "write the visits of every epoch; dry_run: of the first one, here")
    check_data: bool = option(False, "decode every picture once before training and leave out those that fail")
    data_index: str = option(
        "cache",
        "where facts about the files are kept for the next start: the user's cache, beside the folder, or nowhere",
        choices=("cache", "beside", "off"),
    )
    num_workers: int = option(
        2, "processes that read and decode pictures; 0: the training process does it", low=0, high=64
    )
    worker_start: str = option(
        "auto", "how workers are started; auto: the system's own way", choices=("auto", "fork", "spawn")
    )


@dataclass(frozen=True, slots=True)
class NoiseOptions:
    """Noise: what is added to the latents."""

    zero_frequency_noise_ratio: float = option(
        0.02,
        "offset noise per image and channel; 0.05 to 0.10 for dark and bright scenes; -1: zero terminal SNR",
        low=-1,
        high=1,
    )
    pyramid_noise_discount: float | None = option(
        None, "multi-resolution noise, level i scaled by discount^i; over 0.4 for short runs", low=0, high=1
    )
    enable_zero_terminal_snr: bool = option(
        False, "rescale the betas so that the last timestep is pure noise (arXiv 2305.08891)"
    )
    timestep_start: int = option(0, "first timestep that is trained", low=0, high=1000)
    timestep_end: int = option(1000, "timesteps below this one are trained", low=0, high=1000)
    timestep_sampling: str = option(
        "uniform",
        "distribution of the timesteps; stratified spreads those of an update evenly",
        choices=("uniform", "stratified", "logit_normal"),
    )
    embedding_perturbation: float = option(
        0.0, "noise of this strength on the text embedding (arXiv 2405.20494)", low=0
    )
    input_perturbation: float = option(
        0.0, "extra noise on the UNet's input, not on its target (arXiv 2301.11706)", low=0
    )


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Loss: how a prediction is judged."""

    loss_type: str = option(
        "mse",
        "mse_huber goes from huber at t = 0 to mse at t = 1000, huber_mse the other way",
        choices=("mse", "huber", "mse_huber", "huber_mse"),
    )
    min_snr_gamma: float | None = option(None, "min-SNR weight, 5 is usual (arXiv 2303.09556)", low=0)
    loss_weighting: str = option(
        "none", "loss weight per timestep besides min-SNR", choices=("none", "soft_min_snr", "debiased")
    )


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """Optimizer: how the weights change."""

    optimizer_config: str = option("optimizer.json", "optimizers, rates and freezing; see docs/optimizers.md")
    lr: float | None = option(None, "learning rate of the UNet; the text encoder keeps its ratio to it", low=0)
    lr_scheduler: str | None = option(
        None,
        "shape of the learning rate over the run",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_decay_steps: int | None = option(None, "updates of the decay; not given: 1.5 times the run", low=1)
    lr_warmup_steps: int | None = option(None, "updates of the warmup; not given: 2 % of the decay", low=0)
    weight_dtype: str = option(
        "fp32",
        "what trained weights are kept in; bf16 halves the memory and rounds at random",
        choices=("fp32", "bf16"),
    )
    step_in_backward: bool = option(
        False, "change each weight as soon as its gradient is there: less memory; no clip_grad_norm or grad_accum"
    )
    max_bad_updates: int = option(
        20, "stop after so many updates in a row whose loss or gradients were not finite", low=1
    )
    scale_lr: bool = option(False, "multiply the rates by (batch_size * grad_accum) ^ 0.55")
    clip_grad_norm: float | None = option(None, "largest gradient norm, each network by itself; 1.0 is usual", low=0)


@dataclass(frozen=True, slots=True)
class EmaOptions:
    """EMA: a running average of the weights."""

    ema_decay_rate: float | None = option(
        None, "share of the average that stays at each EMA update; turns EMA on", low=0, high=1
    )
    ema_strength_target: float | None = option(
        None,
        "share of the first weights left at the end of the run, 0.01 to 0.15; sets the rate and turns EMA on",
        low=0,
        high=1,
    )
    ema_update_interval: int = option(500, "updates between EMA updates", low=1)
    ema_device: str = option("cpu", "where the average lives", choices=("cpu", "cuda"))
    ema_resume_model: str | None = option(None, "model the average starts from; findlast takes the last EMA model")
    ema_sample_nonema_model: bool = option(False, "sample from the plain weights too")
    ema_sample_ema_model: bool = option(False, "sample from the average; the way it is when neither flag is given")


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """Samples: pictures drawn while training."""

    sample_prompts: str | None = option("sample_prompts.txt", "a prompt a line, or a .json file; none: no samples")
    sample_steps: int = option(250, "updates between samples", low=1)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Checkpoints: what is saved and when."""

    save_ckpt_dir: str | None = option(None, "folder of the single files; not given: the current one")
    ckpt_every_n_minutes: float | None = option(None, "minutes between checkpoints; nothing set: 20", low=0)
    save_every_n_epochs: int | None = option(None, "epochs between checkpoints", low=1)
    save_ckpts_from_n_epochs: int = option(0, "no periodic checkpoint before this epoch", low=0)
    save_full_precision: bool = option(False, "write fp32 models; not given: fp16")
    save_optimizer: bool = option(False, "keep the training state with every checkpoint; the newest two always have it")
    no_save_ckpt: bool = option(False, "write no single file, only Diffusers folders")
    trigger_words: str | None = option(
        None, "words that call up what was learned; written into the metadata of single files, with commas"
    )
    no_prepend_last: bool = option(False, "no last- before the name of the final checkpoint")
    keep_last_n: int | None = option(None, "checkpoints to keep; not given: all", low=2)


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Logs: what can be watched."""

    log_step: int = option(25, "updates between scalars", low=1)
    validation_config: str | None = option(None, "validation file; see docs/watching.md")
    wandb: bool = option(False, "mirror TensorBoard to Weights & Biases")


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Device: where it runs."""

    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    gpuid: int = option(0, "number of the GPU", low=0)
    disable_amp: bool = option(False, "compute in fp32 throughout")
    amp_dtype: str = option(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on the CPU", choices=("auto", "bf16", "fp16")
    )
    deterministic: bool = option(False, "only algorithms that give the same bits every time; slower on a GPU")


@dataclass(frozen=True, slots=True)
class Options:
    """All sections, as resolved for a run."""

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    noise: NoiseOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    ema: EmaOptions
    sample: SampleOptions
    save: SaveOptions
    log: LogOptions
    device: DeviceOptions


SECTIONS: dict[str, type] = {
    "run": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "noise": NoiseOptions,
    "loss": LossOptions,
    "optimizer": OptimizerOptions,
    "ema": EmaOptions,
    "sample": SampleOptions,
    "save": SaveOptions,
    "log": LogOptions,
    "device": DeviceOptions,
}

# Keys that old files hold: accepted, one warning each, no effect.
OBSOLETE: dict[str, str] = {
    "notebook": "not needed",
    "amp": "mixed precision is on by default; disable_amp turns it off",
    "lowvram": "not needed; gradient_checkpointing saves memory, and docs/optimizers.md says what else does",
    "ed1_mode": "not needed",
    "useadam8bit": "choose the optimizer in the optimizer file",
    "disable_xformers": "choose with attn_type",
    "train_sampler": "ddpm, ddim and pndm add noise by the same formula",
}
