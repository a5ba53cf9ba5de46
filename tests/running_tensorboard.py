"""A TensorBoard that is really running, and is asked through its own HTTP interface."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TIMEOUT_S = 40.0


class Page:
    """A running TensorBoard, bound to loopback."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]):
        self.port, self.process = port, process

    def get(self, path: str, body: Any = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/data/plugin/{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def wait(self, ready: Callable[[], Any]) -> Any:
        """Ask until the answer is true, since TensorBoard reads its files in the background."""
        end = time.monotonic() + TIMEOUT_S
        while True:
            assert self.process.poll() is None, "TensorBoard ended"
            with contextlib.suppress(OSError):  # not listening yet; an HTTP error is an OSError as well
                if answer := ready():
                    return answer
            assert time.monotonic() < end, "TensorBoard did not show it in time"
            time.sleep(0.3)

    def steps(self, run: str, tag: str) -> list[int]:
        return [step for _, step, _ in self.get("scalars/scalars", run=run, tag=tag)]

    def values(self, run: str, tag: str) -> list[float]:
        return [value for _, _, value in self.get("scalars/scalars", run=run, tag=tag)]

    def groups(self) -> list[Any]:
        statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        body = {"startIndex": 0, "sliceSize": 100, "allowedStatuses": statuses, "aggregationType": 1}
        return self.get("hparams/session_groups", body).get("sessionGroups", [])


@contextlib.contextmanager
def tensorboard(logdir: Path, *options: str) -> Iterator[Page]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", "--host=127.0.0.1"]
    command += [f"--port={port}", "--reload_interval=1", "--samples_per_plugin=scalars=10000", *options]
    log = (logdir.parent / "tensorboard.log").open("wb")
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env={**os.environ, "HOME": str(logdir.parent)}
    )
    try:
        yield Page(port, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
