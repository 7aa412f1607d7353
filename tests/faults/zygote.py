"""A process that has imported everything and forks a job on request, so that a hundred starts take minutes, not hours.

It reads a JSON line {"arguments", "output", "marks", "hit", "limit"} and answers with two: the process id at the start,
the exit status at the end. `marks` is a file that gets the number of each finished update; `hit` = [function, signal,
times] lets the job signal its group when it enters "module:name", and again half a second later; `limit` is the size
that no file of the job may pass from its first update on, or null.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
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
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) and code >= 0 else 254)


def _fill_disk(loop: Any, limit: int) -> None:
    train = loop.train

    def on_a_full_disk(session: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        train(session)

    loop.train = on_a_full_disk


def _hit_self(place: str, number: int, times: int) -> None:
    module_name, name = place.split(":")
    holder: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original: Callable[..., Any] = getattr(holder, last)

    def hit(*arguments: Any, **named: Any) -> Any:
        setattr(holder, last, original)
        os.killpg(0, number)
        for again in range(1, times):
            threading.Timer(0.5 * again, os.killpg, (0, number)).start()
        return original(*arguments, **named)

    setattr(holder, last, hit)


if __name__ == "__main__":
    main()
