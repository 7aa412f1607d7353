"""A process that has imported everything and forks a job on request, so that a hundred starts take minutes, not hours.

It reads a JSON line {"arguments", "output", "marks", "hit", "limit", "broken"} and answers with two: the process id at
the start, the exit status at the end. `output` is a file, or null for a job whose standard streams are closed. `marks`
is a file that gets the number of each finished update. `hit` = [function, call, signal, times] lets the job signal its
group when it enters "module:name" for the `call`-th time, and again half a second later. `limit` is the size that no
file of the job may pass from its first update on, or null. `broken` puts something in the way of all that reports.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    """Serve until the other end is closed."""
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    for module in ("train", "training.assembly", "training.loop", "training.between", "utils.export", "utils.sampling"):
        importlib.import_module(module)
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write("ready\n")
    for line in sys.stdin:
        _serve(json.loads(line), answers)


def _serve(request: dict[str, Any], answers: TextIO) -> None:
    pid = os.fork()
    if pid == 0:
        answers.close()
        _become_job(request)
    answers.write(f"{pid}\n")
    _, status = os.waitpid(pid, 0)
    answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def _become_job(request: dict[str, Any]) -> None:
    # A session of its own, so that a signal to its group reaches its workers and nobody else.
    os.setsid()
    # A shell lets what it starts in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _lead_output(request["output"])
    import train

    # By name, because the loop has imported the function that is wrapped here.
    loop: Any = importlib.import_module("training.loop")
    marks = os.open(request["marks"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    after = loop.after_update

    def mark(session: Any) -> None:
        os.write(marks, f"{session.progress.update}\n".encode())
        after(session)

    loop.after_update = mark
    if request["limit"] is not None:
        _fill_disk(loop, request["limit"])
    if request["broken"]:
        _break_sinks(loop)
    if request["hit"] is not None:
        _hit_self(*request["hit"])
    try:
        # What `python train.py` does, with the interpreter's own end: threads are joined, exits run.
        code: Any = train.main(request["arguments"])
    except KeyboardInterrupt:
        # As the interpreter ends; a shell shows 130.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code if isinstance(code, int) and code >= 0 else 254)


def _lead_output(path: str | None) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if path is None:
        # As a program finds itself that was started with >&- 2>&-.
        sys.stdout = sys.stderr = None
        os.close(1)
        os.close(2)
        return
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _break_sinks(loop: Any) -> None:
    """From the first update on a folder stands where each log should be, and a file where the samples should."""
    train = loop.train

    def with_broken_sinks(session: Any) -> None:
        run = session.run
        for path in [run.log, run.metrics, *run.folder.glob("events.*"), run.folder / "loss_by_image.csv"]:
            path.unlink(missing_ok=True)
            path.mkdir()
        shutil.rmtree(run.samples)
        run.samples.touch()
        train(session)

    loop.train = with_broken_sinks


def _fill_disk(loop: Any, limit: int) -> None:
    train = loop.train

    def on_a_full_disk(session: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        train(session)

    loop.train = on_a_full_disk


def _hit_self(place: str, call: int, number: int, times: int) -> None:
    module_name, name = place.split(":")
    holder: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original: Callable[..., Any] = getattr(holder, last)
    calls = itertools.count(1)

    def hit(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.killpg(0, number)
            for again in range(1, times):
                threading.Timer(0.5 * again, os.killpg, (0, number)).start()
        return original(*arguments, **named)

    setattr(holder, last, hit)


if __name__ == "__main__":
    main()
