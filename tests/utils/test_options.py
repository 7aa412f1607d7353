"""Options: flags over JSON over defaults, and every mistake at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import OBSOLETE, SECTIONS
from utils.errors import ProblemsError
from utils.option_docs import PAGE, markdown
from utils.options import assemble, flat, load_options, reload_options
from utils.schema import option_fields

ROOT = Path(__file__).parent.parent.parent
FIELDS = {name: field for section in SECTIONS.values() for name, field in option_fields(section).items()}


def written(folder: Path, content: object) -> str:
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        load_options(argv)
    return [str(problem) for problem in caught.value.problems]


def test_flag_over_file_over_default(tmp_path: Path) -> None:
    config = written(tmp_path, {"batch_size": 3, "grad_accum": 5, "seed": None})
    loaded = load_options(["--config", config, "--batch_size", "7"])
    assert loaded.options.data.batch_size == 7
    assert loaded.options.data.grad_accum == 5
    assert loaded.options.run.seed == 555, "null means not given"
    assert loaded.given["grad_accum"] == 5
    assert "seed" not in loaded.given


def test_a_flag_can_switch_off_what_the_file_switched_on(tmp_path: Path) -> None:
    config = written(tmp_path, {"shuffle_tags": True, "scale_lr": True})
    options = load_options(["--config", config, "--shuffle_tags", "false"]).options
    assert not options.data.shuffle_tags
    assert options.optimizer.scale_lr


def test_five_mistakes_of_different_kinds_are_told_at_once(tmp_path: Path) -> None:
    config = written(tmp_path, {"batch_sise": 4, "lr": "fast", "flip_p": 2, "amp_dtype": "fp8", "seed": 1.5})
    told = problems_of("--config", config, "--max_epoch", "3", "--grad_accum", "0")
    assert len(told) == 7
    for expected in (
        "my.json: batch_sise = 4: unknown; did you mean batch_size?",
        "my.json: lr = 'fast': must be a number",
        "my.json: flip_p = 2.0: must be between 0 and 1",
        "my.json: amp_dtype = 'fp8': must be one of auto, bf16, fp16",
        "my.json: seed = 1.5: must be a whole number",
        "command line: --max_epoch: unknown; did you mean max_epochs?",
        "command line: grad_accum = 0: must be at least 1",
    ):
        assert any(expected in line for line in told), expected


def test_mistakes_end_the_program_with_2_before_any_model_library_is_loaded(tmp_path: Path) -> None:
    config = written(tmp_path, {"batch_sise": 4, "lr": "fast", "flip_p": 2, "amp_dtype": "fp8", "seed": 1.5})
    code = (
        "import sys, train\n"
        f"code = train.main(['--config', {config!r}])\n"
        "loaded = [m for m in ('torch', 'diffusers', 'transformers', 'accelerate') if m in sys.modules]\n"
        "print('LOADED', loaded); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert "LOADED []" in done.stdout
    assert "5 problems" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not valid JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"flip_p": NaN}', "flip_p = nan: must be a finite number"),
        ('{"lr": ' + "9" * 400 + "}", "must be a finite number"),
        ('{"lr": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
        ('{"batch_size": true}', "batch_size = True: must be a whole number"),
        ('{"shuffle_tags": 1}', "shuffle_tags = 1: must be true or false"),
        ('{"resolution": 500}', "resolution = 500: must be a multiple of bucket_step (64)"),
        ('{"timestep_start": 9, "timestep_end": 9}', "timestep_start = 9: must be below timestep_end (9)"),
        ('{"project_name": "../up"}', "project_name = '../up': only letters"),
        ('{"disable_unet_training": true, "disable_textenc_training": true}', "nothing is left to train"),
        ('{"zero_frequency_noise_ratio": -0.5}', "must be 0 or more, or -1"),
    ],
)
def test_a_wrong_file_is_told_by_name(tmp_path: Path, content: str, expected: str) -> None:
    told = problems_of("--config", written(tmp_path, content))
    assert any(expected in line and "my.json" in line for line in told), told


def test_a_missing_file_is_told_only_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_options([]).options.run.config == "train.json"
    assert "no such file" in problems_of("--config", "train.json")[0]


def test_a_file_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_bytes('{"project_name": "Grün"}'.encode("cp1252"))
    assert "is not UTF-8" in problems_of("--config", str(tmp_path / "my.json"))[0]


def test_a_flag_without_its_value_is_told() -> None:
    assert problems_of("--lr", "--seed", "3") == ["command line: --lr: needs a value: a number"]


def test_obsolete_keys_warn_and_change_nothing(tmp_path: Path) -> None:
    loaded = load_options(["--config", written(tmp_path, dict.fromkeys(OBSOLETE, True))])
    assert len(loaded.warnings) == len(OBSOLETE)
    assert loaded.given == {"config": str(tmp_path / "my.json")}


def test_resolved_options_are_a_valid_file_that_resolves_to_itself(tmp_path: Path) -> None:
    first = load_options(
        ["--config", written(tmp_path, {"lr": 1e-6, "data_root": ["a", "b"], "min_snr_gamma": 5})]
    ).options
    config = written(tmp_path, flat(first))
    again = load_options(["--config", config])
    assert flat(again.options) == {**flat(first), "config": config}
    assert again.warnings == ()


def test_reading_again_keeps_the_command_line_on_top(tmp_path: Path) -> None:
    config = written(tmp_path, {"batch_size": 3, "clip_skip": 1})
    loaded = load_options(["--config", config, "--clip_skip", "2"])
    written(tmp_path, {"batch_size": 4, "clip_skip": 3})
    again = reload_options(loaded)
    assert (again.options.data.batch_size, again.options.model.clip_skip) == (4, 2)
    written(tmp_path, "{")
    with pytest.raises(ProblemsError):
        reload_options(loaded)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_option_has_help_and_a_default_that_it_accepts(name: str) -> None:
    from utils.schema import check_value

    field = FIELDS[name]
    assert len(field.spec.help) > 10
    if field.default is None:
        assert field.optional
    else:
        assert check_value(field, field.default, "default") == (field.default, None)


def test_the_page_of_options_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run python -m utils.option_docs"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_options(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in FIELDS)
    assert all((section.__doc__ or "").split(":")[0] in shown for section in SECTIONS.values())


def test_defaults_need_no_file() -> None:
    assert flat(assemble({}))["zero_frequency_noise_ratio"] == 0.02
