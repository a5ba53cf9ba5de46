"""Processes that are asked, one line at a time, and answer by a line; one that has answered is asked again."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Literal

logger = logging.getLogger(__name__)

GRACE_S = 10.0  # to end in order


class Ended(Exception):
    """A process ended before it answered; the message is its last words."""


class Late(Exception):
    """A process did not answer in time, and was ended."""


class Processes:
    """Processes of one command, as many as are asked at the same time. A context: they end with it.

    Args:
        command: of each.
        patience: seconds for an answer.
        asked: whether a process is asked again, or ends with its first answer.
    """

    def __init__(self, command: Sequence[str], patience: float, asked: Literal["again", "once"] = "again"):
        self._command, self._patience, self._asked = list(command), patience, asked
        self._idle: defaultdict[Hashable, list[_Process]] = defaultdict(list)
        self._lock = threading.Lock()

    def ask(self, kind: Hashable, question: str) -> str:
        """The answer to a question, from a process that has answered this kind of question before, or a new one.

        Raises:
            Ended, Late: there is none. Another process will be asked what is asked next.
        """
        with self._lock:
            idle = self._idle[kind]
            process = idle.pop() if idle else None
        process = process or _Process(self._command)
        try:
            answer = process.ask(question, self._patience)
        except BaseException:
            process.end()
            raise
        if self._asked == "once":
            process.end()
            return answer
        with self._lock:
            idle.append(process)
        return answer

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for idle in self._idle.values():
            for process in idle:
                process.end()


class _Process:
    def __init__(self, command: Sequence[str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        self._said: deque[str] = deque(maxlen=1000)  # lines
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._said.extend(lines)  # until it ends

    def ask(self, question: str, patience: float) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(patience, give_up)
        timer.start()
        try:
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer.endswith("\n"):
            return answer
        if late.is_set():
            raise Late
        raise Ended(self._last_words())

    def _last_words(self) -> str:
        code = self._process.wait()
        self._listener.join()
        logger.debug("%s", "".join(self._said))
        lines = [line.strip() for line in self._said if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"

    def end(self) -> None:
        """Ends it, in order if it can: it has no more to read."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._listener.join(GRACE_S)
