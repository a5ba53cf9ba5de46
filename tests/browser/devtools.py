"""A page in a headless browser, asked through the DevTools protocol with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--remote-debugging-port=0", "--disable-dev-shm-usage", "--disable-background-networking",
)  # fmt: skip

# What a reader sees, also inside shadow roots, by the selector of its elements.
_VISIBLE = """
(selector) => {
  const found = [];
  const walk = (root) => {
    for (const element of root.querySelectorAll("*")) {
      if (element.matches(selector) && element.checkVisibility()) found.push(element.textContent.trim());
      if (element.shadowRoot) walk(element.shadowRoot);
    }
  };
  walk(document);
  return found;
}
"""


class Page:
    """The one tab of a browser."""

    def __init__(self, address: str):
        host, port = re.fullmatch(r"ws://([^:/]+):(\d+)/.*", address).groups()  # pyright: ignore[reportOptionalMemberAccess]
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        path = "/" + address.split("/", 3)[3]
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        while self._stream.readline() not in (b"\r\n", b""):  # the headers of the answer
            pass
        self._number = 0

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": params}).encode()
        size = struct.pack("!BBQ", 0x81, 0x80 | 127, len(data))  # one text frame of a 64-bit length, masked
        self._socket.sendall(size + b"\0\0\0\0" + data)  # a mask of zeros changes nothing
        while True:
            answer = json.loads(self._receive())
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> bytes:
        message = b""
        while True:
            first, length = self._stream.read(2)
            if length >= 126:
                width, code = (2, "!H") if length == 126 else (8, "!Q")
                (length,) = struct.unpack(code, self._stream.read(width))
            data = self._stream.read(length)
            if first & 0x0F <= 2:  # text, or more of it; not a ping
                message += data
                if first & 0x80:
                    return message

    def open(self, url: str) -> None:
        """Go to another page."""
        self.call("Page.navigate", url="about:blank")  # a change behind the # alone would not load anything
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def visible(self, selector: str) -> list[str]:
        """The texts of all visible elements that match, in shadow roots as well."""
        return self.evaluate(f"({_VISIBLE})({json.dumps(selector)})")

    def screenshot(self, path: Path) -> None:
        """Save what is in the window as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browse(chromium: str, width: int = 1500, height: int = 1000) -> Iterator[Page]:
    """A browser with one page of that size in CSS pixels."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = _port(process, Path(profile) / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            with contextlib.closing(Page(pages[0]["webSocketDebuggerUrl"])) as page:
                yield page
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen[bytes], file: Path) -> int:
    """The port that the browser says it listens on."""
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(FileNotFoundError):
            if (lines := file.read_text().splitlines()) and len(lines) > 1:
                return int(lines[0])
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < end, "the browser did not start in time"
        time.sleep(0.05)
