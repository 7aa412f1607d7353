"""How well the starter learns, as JSON lines: `python -m tests.bench.learning base|teach|speed|options|all`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from starter.exam import GUIDANCE, Question, answers, examine, new_questions, old_questions, open_pipeline, score
from starter.make_pictures import TAUGHT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "starter" / "train.json"
MODEL = ROOT / "starter" / "model"
ENOUGH = 0.9


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: its last checkpoint (and the averaged one), its wall time and its scalars."""

    folder: Path
    checkpoint: Path
    average: Path | None
    seconds: float
    metrics: tuple[Mapping[str, Any], ...]


def train(out: Path, changes: Mapping[str, Any], *, optimizer: Mapping[str, Any] | None = None) -> Trained:
    """Run train.py in a process of its own on starter/train.json with `changes`, logging into `out`.

    A run that is done there already is not done again: the table takes hours and may be cut off.
    `optimizer`: changes to the "base" of starter/optimizer.json. Raises `RuntimeError` with the output if it fails.
    """
    done_file = out / "seconds.json"
    if done_file.exists():
        return finished(out, json.loads(done_file.read_text(encoding="utf-8")))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    options = json.loads(CONFIG.read_text(encoding="utf-8"))
    rates = json.loads((ROOT / options["optimizer_config"]).read_text(encoding="utf-8"))
    rates["base"] |= dict(optimizer or {})
    (out / "optimizer.json").write_text(json.dumps(rates), encoding="utf-8")
    (out / "samples.json").write_text(json.dumps({"generate_pretrain_samples": False}), encoding="utf-8")
    options |= {
        "logdir": str(out / "logs"),
        "no_save_ckpt": True,
        "optimizer_config": str(out / "optimizer.json"),
        "sample_prompts": str(out / "samples.json"),
        "sample_steps": 10**6,
    } | dict(changes)
    (out / "train.json").write_text(json.dumps(options), encoding="utf-8")
    started = time.perf_counter()
    command = [sys.executable, "train.py", "--config", str(out / "train.json")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | threads)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    done_file.write_text(json.dumps(seconds), encoding="utf-8")
    return finished(out, seconds)


def finished(out: Path, seconds: float) -> Trained:
    """What a run of `seconds` has left in `out`."""
    (folder,) = (path for path in (out / "logs").iterdir() if path.is_dir())
    checkpoints = sorted((folder / "ckpts").glob("last-*"))
    averages = [path for path in checkpoints if path.name.endswith("_ema")]
    (last,) = (path for path in checkpoints if not path.name.endswith("_ema"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(folder, last, averages[0] if averages else None, seconds, tuple(json.loads(line) for line in lines))


def marks(folder: Path, count: int, *, guidance: float = GUIDANCE) -> dict[str, float]:
    """Shares of right pictures (shape and colour) of the new and of the old concepts, by the model in `folder`."""
    pipeline = open_pipeline(folder)
    return {
        "new": examine(pipeline, new_questions(count, seen=TAUGHT), guidance=guidance).right,
        "old": examine(pipeline, old_questions(count), guidance=guidance).right,
    }


def base(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figure 1: the model as it comes, on what it was taught and on the word it has never met."""
    pipeline = open_pipeline(MODEL)
    for guidance in (1.0, 3.0, GUIDANCE, 7.0):
        yield {"guidance": guidance, "old": asdict(examine(pipeline, old_questions(options.count), guidance=guidance))}
    new = new_questions(options.count, seen=TAUGHT)
    yield {"guidance": GUIDANCE, "new": asdict(examine(pipeline, new))}


def teach(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figure 2: before and after `make train`, for every seed, and the mean and spread over them."""
    before = marks(MODEL, options.count)
    yield {"before": before}
    after = []
    for seed in options.seeds:
        run = taught(options.out, seed)
        after.append(marks(run.checkpoint, options.count))
        yield {"seed": seed, "seconds": round(run.seconds, 1)} | after[-1]
    yield {"after": summary(after), "old_lost": before["old"] - statistics.mean(row["old"] for row in after)}


def taught(out: Path, seed: int) -> Trained:
    """`make train` with another seed; checkpoints on the way, which do not change what is learned."""
    return train(out / f"teach-{seed}", {"seed": seed, "save_every_n_epochs": 10})


def speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figure 5: updates and seconds of training until 90 % of the new concept's pictures are right."""
    for seed in options.seeds:
        run = taught(options.out, seed)
        questions = new_questions(options.count, seen=TAUGHT)
        curve: list[dict[str, float]] = []
        for checkpoint in sorted((run.folder / "ckpts").glob("*-gs*"), key=update_of):
            right = examine(open_pipeline(checkpoint), questions).right
            curve.append({"update": update_of(checkpoint), "new": right})
            if right >= ENOUGH:
                break
        reached = curve[-1]["update"] if curve[-1]["new"] >= ENOUGH else None
        share = None if reached is None else reached / update_of(run.checkpoint)
        yield {
            "seed": seed,
            "updates_to_90": reached,
            "seconds_to_90": None if share is None else round(share * run.seconds, 1),
            "curve": curve,
        }


def update_of(checkpoint: Path) -> int:
    """The update that a checkpoint's name tells."""
    return int(checkpoint.name.split("-gs")[1].split("_")[0])


@dataclass(frozen=True, slots=True)
class Comparison:
    """An option's settings on this world, and how a checkpoint of each is judged.

    Args:
        optimizer: changes to the "base" of the optimizer file, for all settings.
        updates: of its runs, where that is not `--updates`.
    """

    settings: Mapping[str, Mapping[str, Any]]
    judge: Callable[[Trained, int], dict[str, Any]]
    optimizer: Mapping[str, Any] | None = None
    updates: int | None = None


def judge_concepts(run: Trained, count: int) -> dict[str, Any]:
    """New and old concepts."""
    return dict(marks(run.average or run.checkpoint, count))


def judge_guidance(run: Trained, count: int) -> dict[str, Any]:
    """New and old concepts with strong guidance and without: guidance leans on the empty caption."""
    return {f"guidance {scale:g}": marks(run.checkpoint, count, guidance=scale) for scale in (1.0, 4.0, 9.0)}


def judge_extremes(run: Trained, count: int) -> dict[str, Any]:
    """Dark and bright scenes: shares of right backgrounds, and the mean grey level of each kind."""
    pipeline = open_pipeline(run.checkpoint)
    questions = [
        Question(question.shape, question.colour, ("black", "white")[i % 2], question.size)
        for i, question in enumerate(old_questions(count))
    ]
    pictures = answers(pipeline, questions)
    levels = [round(statistics.mean(brightness(picture) for picture in pictures[i::2]), 1) for i in (0, 1)]
    found = score(questions, pictures)
    return {"background": found.background, "right": found.right, "mean_levels": levels}


def brightness(picture: Image.Image) -> float:
    """The mean grey level, 0 .. 255."""
    return statistics.mean(picture.convert("L").tobytes())


def judge_loss(run: Trained, _: int) -> dict[str, Any]:
    """The validation loss over the updates."""
    return {"validation": [[row["update"], row["loss/val"]] for row in run.metrics if "loss/val" in row]}


def comparisons(out: Path) -> dict[str, Comparison]:
    """Figure 3: the options, each with its settings."""
    out.mkdir(parents=True, exist_ok=True)
    extremes = draw_extremes(out / "extremes")
    offset: dict[str, dict[str, Any]] = {
        "0": {"data_root": str(extremes)},
        "0.05": {"zero_frequency_noise_ratio": 0.05, "data_root": str(extremes)},
        "0.1": {"zero_frequency_noise_ratio": 0.1, "data_root": str(extremes)},
    }
    held_out = out / "validation.json"
    held_out.write_text(json.dumps({"every_n_epochs": 5, "auto_split_proportion": 0.25}), encoding="utf-8")
    return {
        "cond_dropout": Comparison({"0.1": {}, "0": {"cond_dropout": 0.0}}, judge_guidance),
        "ema": Comparison(
            {"none": {}, "0.98 every update": {"ema_decay_rate": 0.98, "ema_update_interval": 1}},
            judge_concepts,
            {"lr": 1e-3, "lr_scheduler": "constant"},
        ),
        "zero_frequency_noise_ratio": Comparison(offset, judge_extremes),
        "zero_frequency_noise_ratio, a short run": Comparison(offset, judge_extremes, updates=40),
        "min_snr_gamma": Comparison(
            {
                "none": {"min_snr_gamma": None, "validation_config": str(held_out)},
                "5": {"min_snr_gamma": 5.0, "validation_config": str(held_out)},
            },
            lambda run, count: judge_loss(run, count) | judge_concepts(run, count),
        ),
        "preservation": Comparison(
            {"without": {"data_root": "starter/pictures/zorps"}, "with": {}},
            judge_concepts,
        ),
        "text_encoder": Comparison({"trained": {}, "frozen": {"disable_textenc_training": True}}, judge_concepts),
        "zero_terminal_snr": Comparison(
            {
                "epsilon": {"data_root": str(extremes)},
                "v-prediction, zero terminal SNR": {
                    "data_root": str(extremes),
                    "prediction_type": "v_prediction",
                    "enable_zero_terminal_snr": True,
                },
            },
            judge_extremes,
        ),
    }


def draw_extremes(folder: Path) -> Path:
    """48 captioned pictures of old shapes on black and on white."""
    from starter.world import EXTREMES, draw, plain_caption, random_scene
    from utils.seeding import stream

    folder.mkdir(parents=True, exist_ok=True)
    rng = stream(0, "extremes")
    for i in range(48):
        scene = random_scene(rng, backgrounds=(list(EXTREMES)[i % 2],))
        draw(scene, rng).save(folder / f"{plain_caption(scene.colour, scene.shape, scene.background)}_{i:02}.png")
    return folder


def options_table(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figure 3: every comparison (or `--only`), every setting, every seed, everything else equal.

    Runs are of `--updates` updates unless a comparison says otherwise, with a rate that falls a tenth slower. Settings
    that amount to the same run share it.
    """
    runs: dict[str, Trained] = {}
    for seed in options.seeds:
        for name, comparison in comparisons(options.out).items():
            if options.only and name not in options.only:
                continue
            updates = options.updates if comparison.updates is None else comparison.updates
            for label, setting in comparison.settings.items():
                changes = {"max_steps": updates, "max_epochs": 10**4, **setting, "seed": seed}
                rates = {"lr_decay_steps": updates * 11 // 10} | dict(comparison.optimizer or {})
                key = json.dumps([changes, rates], sort_keys=True)
                if key not in runs:
                    folder = options.out / f"{name}-{label}-{seed}".replace(" ", "_").replace(",", "")
                    runs[key] = train(folder, changes, optimizer=rates)
                judged = comparison.judge(runs[key], options.count)
                yield {"option": name, "setting": label, "seed": seed} | judged


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, least and most of every column."""
    return {
        name: {
            "mean": round(statistics.mean(row[name] for row in rows), 4),
            "least": min(row[name] for row in rows),
            "most": max(row[name] for row in rows),
        }
        for name in rows[0]
    }


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "base": base,
    "teach": teach,
    "speed": speed,
    "options": options_table,
}


def main() -> None:
    """Read the command line, run the parts and print what they find as they find it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--count", type=int, default=200, help="pictures a score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", help="options of the table")
    parser.add_argument("--out", type=Path, help="folder of the runs; not given: a temporary one")
    parser.add_argument("--updates", type=int, default=700, help="of each run of the table")
    parser.add_argument("--threads", type=int, default=2, help="of training and sampling")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.out = Path(folder) if options.out is None else options.out.resolve()
        for name in PARTS if options.part == "all" else (options.part,):
            for row in PARTS[name](options):
                print(json.dumps({"part": name} | row), flush=True)


if __name__ == "__main__":
    main()
