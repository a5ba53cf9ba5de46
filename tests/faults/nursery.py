"""Starts processes of the program without paying for their imports each time.

This process imports all that training needs and then forks, on request, a child that runs one command line
and ends like any other process. Whatever a fork could inherit is not there yet: no backend of jax, no thread,
no open file of a run. A start costs a third of the CPU time that way, so that there can be many more faults.

Reads orders as lines of JSON from stdin and answers each with a line:

    {"start": "jaxablate.main", "argv", "output", "cwd", "env", "file_size", "failing"}  -> {"pid"}
    {"wait": pid, "patience": "none" | "any"}     -> {"code": as `Popen.returncode` has it, null if it still runs}
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import resource
import signal
import sys
import threading
from typing import Any

ENTRIES = ("jaxablate.main", "jaxablate.worker", "jaxablate.cli", "tests.schedule.toy_studies")
# What they import only when it is needed: here it is needed every time.
ALSO = ("jaxablate.train", "jaxablate.analysis.text", "jaxablate.schedule.local", "jaxablate.userfile",
        "matplotlib.backends.backend_agg", "tests.toy")  # fmt: skip


def main() -> int:
    """Serves until stdin ends."""
    for name in (*ENTRIES, *ALSO):
        importlib.import_module(name)
    logging.root.handlers.clear()
    assert len(os.listdir("/proc/self/task")) == threading.active_count() == 1, "a thread would not be forked"
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if child := order.get("wait"):
            pid, status = os.waitpid(child, os.WNOHANG if order["patience"] == "none" else 0)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        elif pid := os.fork():
            answer = {"pid": pid}
        else:
            return _become(order)
        print(json.dumps(answer), flush=True)
    return 0


def _become(order: dict[str, Any]) -> int:
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, max(output, nothing) + 1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    if size := order["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if failing := order["failing"]:
        _fail(**failing)
    return importlib.import_module(order["start"]).main(order["argv"])


def _fail(call: str, after: int, error: int) -> None:
    """From the call number `after` on, a function of `os` raises OSError, as it does on a broken disk."""
    real, calls = getattr(os, call), itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise OSError(error, os.strerror(error))
        return real(*args, **options)

    setattr(os, call, failing)


if __name__ == "__main__":
    sys.exit(main())
