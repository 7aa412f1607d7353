"""TensorBoard as a user sees it: started on a log folder, driven in headless Chromium, photographed.

`python -m tests.board logs docs/pictures` needs `chromium` and `chromedriver` (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

PAGES = {
    "scalars": "#timeseries",
    "charts": "#custom_scalars",
    "images": "#images&tagFilter=sample",
    "first-update": "#images&tagFilter=first",
    "text": "#text",
    "histograms": "#histograms",
    "hparams": "#hparams",
}
# TensorBoard's pages live in nested shadow trees.
_VISIBLE_TEXT = """
const walk = node => {
  let text = node.nodeType === 3 ? node.textContent : "";
  if (node.shadowRoot) text += walk(node.shadowRoot);
  if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return text;
  for (const child of node.childNodes) text += walk(child);
  return text + " ";
};
return walk(document.body).replace(/\\s+/g, " ");
"""
_LOADED_PICTURES = """
const found = [];
const walk = node => {
  if (node.nodeName === "IMG" && node.naturalWidth > 0) found.push([node.naturalWidth, node.naturalHeight]);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return found;
"""


def available() -> bool:
    """Whether there is a browser to drive."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(command: list[str], ready: str, seconds: float = 60) -> Iterator[None]:
    """`command` runs; the block begins when `ready` answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(ready, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < until, f"{command[0]} does not answer"
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(20)


class Browser:
    """A page in headless Chromium, by the WebDriver protocol."""

    def __init__(self, address: str, width: int = 1400, height: int = 1000) -> None:
        self._address = address
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--blink-settings=preferredColorScheme=1",
        ]
        arguments += [f"--window-size={width},{height}"]
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}}
        self._session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, address: str) -> None:
        """Go to `address`, from an empty page so that a change of its fragment loads, too."""
        self._call("POST", f"{self._session}/url", {"url": "about:blank"})
        self._call("POST", f"{self._session}/url", {"url": address})

    def run(self, script: str) -> Any:
        """What `script` returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        """All text of the page."""
        return str(self.run(_VISIBLE_TEXT))

    def pictures(self) -> list[list[int]]:
        """Width and height of each picture that has loaded."""
        found: list[list[int]] = self.run(_LOADED_PICTURES)
        return found

    def wait_for(self, words: str, seconds: float = 40) -> str:
        """The text of the page, once it holds `words`."""
        until = time.monotonic() + seconds
        while words not in (text := self.text()):
            assert time.monotonic() < until, f"{words!r} is not on the page: {text[:2000]}"
            time.sleep(0.3)
        return text

    def wait_for_picture(self, width: int, height: int, seconds: float = 40) -> None:
        """Come back when a picture of this size has loaded."""
        until = time.monotonic() + seconds
        while [width, height] not in (found := self.pictures()):
            assert time.monotonic() < until, f"no picture of {width} x {height} in {found}"
            time.sleep(0.3)

    def photograph(self, path: Path) -> None:
        """Write a PNG of the page, in as few colours as it needs to look right."""
        data = base64.b64decode(self._call("GET", f"{self._session}/screenshot", None))
        Image.open(io.BytesIO(data)).convert("RGB").quantize(192).save(path, optimize=True)

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", self._session, None)

    def _call(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


@contextmanager
def board(logdir: Path) -> Iterator[tuple[Browser, str]]:
    """A browser, and the address of a TensorBoard on `logdir`."""
    port, driver = free_port(), free_port()
    address = f"http://127.0.0.1:{port}/"
    tensorboard = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    tensorboard += ["--load_fast=false", "--reload_interval", "5"]
    with (
        served(tensorboard, address),
        served(["chromedriver", f"--port={driver}"], f"http://127.0.0.1:{driver}/status"),
    ):
        browser = Browser(f"http://127.0.0.1:{driver}")
        try:
            yield browser, address
        finally:
            browser.close()


def main() -> None:
    """Photograph every page of the board."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with board(arguments.logdir) as (browser, address):
        for name, fragment in PAGES.items():
            browser.open(address + fragment)
            time.sleep(8)  # charts draw themselves when their data has come
            browser.photograph(arguments.out / f"board-{name}.png")


if __name__ == "__main__":
    main()
