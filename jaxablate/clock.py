"""Speed and memory of a training program, compile time apart."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import jax

from jaxablate.data import Batch
from jaxablate.program import Program, Step
from jaxablate_gpus import peak_flops

LARGEST = "largest"  # the size of batch that is not cut


class Clock:
    """Times stretches of steps between two fetches of metrics; evaluation and checkpoints are left out."""

    def __init__(self, batch_size: int, tokens: int):
        self._batch_size, self._tokens = batch_size, tokens
        self._flops: float | None = None  # of one step of one member in this stage
        self._compile_sec = 0.0
        self._program_bytes: int | None = None
        self._peak: float | None = None
        self._mark: tuple[int, float] | None = None
        self._pause_sec = 0.0  # evaluations and checkpoints since the last row
        self._cut: list[int] = []  # steps since then with a smaller batch
        self._sizes = Counter[str]()

    def compile(self, program: Program, batch: Batch) -> Step:
        """The compiled step of `program` for batches like this one, timed."""
        began = time.perf_counter()
        step = program.compile_step(batch)
        self._compile_sec += time.perf_counter() - began
        flops = program.task.flops_per_example
        self._flops = None if flops is None else flops * self._batch_size
        memory = step.compiled.memory_analysis()
        if memory is not None:
            taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            self._program_bytes = max(taken, self._program_bytes or 0)
        devices = program.mesh.devices.flatten()
        peak = peak_flops(devices[0].device_kind, program.cohort.base.training.compute_dtype)
        self._peak = peak * len(devices) / len(program.cohort.runs) if peak else None
        self._mark = None
        return step

    def stepped(self, n: int, size: str) -> None:
        """Notes that step `n` was dispatched, with a batch of this size."""
        self._sizes[size] += 1
        if size != LARGEST:
            self._cut.append(n)

    def sizes(self) -> dict[str, int]:
        """Steps by size of batch since this was asked last."""
        sizes, self._sizes = self._sizes, Counter[str]()
        return dict(sizes)

    def restart(self, n: int) -> None:
        """Step `n` is done and the device idle: the next stretch begins now."""
        now = time.perf_counter()
        if self._mark is not None and self._mark[0] == n:
            self._pause_sec += now - self._mark[1]
        self._mark = (n, now)

    def lap(self, n: int) -> dict[str, Any]:
        """The `perf/…` row of the stretch that ends with step `n`, of one member.

        The first stretch after a compilation holds first-call costs, so its row has the compile time alone. Tokens and
        FLOPs are those of the largest batch, so of a stretch with others nothing is said of them.
        """
        now = time.perf_counter()
        last, self._mark = self._mark, (n, now)
        pause, self._pause_sec = self._pause_sec, 0.0
        cut, self._cut = [k for k in self._cut if k <= n], [k for k in self._cut if k > n]
        if last is None:
            compile_sec, self._compile_sec = self._compile_sec, 0.0
            return {"perf/compile_sec": compile_sec}
        if last[0] == n:
            return {}
        rate = (n - last[0]) / (now - last[1])
        row = {
            "perf/steps_per_sec": rate,
            "perf/step_ms": 1000 / rate,
            "perf/examples_per_sec": rate * self._batch_size,
            "perf/mfu": rate * self._flops / self._peak if self._flops and self._peak and not cut else None,
            **self.memory(),
        }
        if pause:  # how long evaluations and checkpoints held up the training before this stretch
            row["perf/pause_sec"] = pause
        if self._tokens and not cut:
            row["perf/tokens_per_sec"] = rate * self._batch_size * self._tokens
        return row

    def memory(self) -> dict[str, Any]:
        """Peak bytes of one device: measured where the device counts them, else of the compiled program."""
        measured = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return {"perf/peak_bytes": self._program_bytes if measured is None else measured}
