"""Speed and memory of a training program, compile time apart."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from jaxablate.program import Program
from jaxablate.provenance import peak_flops


class Clock:
    """Times stretches of steps between two fetches of metrics; evaluation and checkpoints are left out."""

    def __init__(self) -> None:
        self.compile_sec = 0.0
        self._flops: float | None = None  # of one step of the whole cohort
        self._program_bytes: int | None = None
        self._peak: float | None = None
        self._rates: list[float] = []
        self._mark: tuple[int, float] | None = None

    def compile(self, program: Program) -> Any:
        """The compiled step of `program`, timed."""
        began = time.perf_counter()
        step = program.compile_step()
        self.compile_sec += time.perf_counter() - began
        self._flops = (step.cost_analysis() or {}).get("flops")
        memory = step.memory_analysis()
        if memory is not None:
            self._program_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        devices = program.mesh.devices.flatten()
        peak = peak_flops(devices[0].device_kind, program.cohort.base.training.compute_dtype)
        self._peak = peak * len(devices) if peak else None
        self.restart()
        return step

    def restart(self) -> None:
        """What has passed since the last lap counts for nothing."""
        self._mark = None

    def lap(self, n: int, batch_size: int, tokens: int) -> dict[str, Any]:
        """The `perf/…` row of the stretch that ends with step `n`; empty for the first after a restart."""
        now = time.perf_counter()
        last, self._mark = self._mark, (n, now)
        if last is None:
            return {"perf/compile_sec": self.compile_sec} if n == 1 else {}
        rate = (n - last[0]) / (now - last[1])
        self._rates.append(rate)
        row = {
            "perf/steps_per_sec": rate,
            "perf/step_ms": 1000 / rate,
            "perf/examples_per_sec": rate * batch_size,
            "perf/peak_bytes": self.memory()["peak_bytes"],
        }
        if tokens:
            row["perf/tokens_per_sec"] = rate * batch_size * tokens
        if self._flops and self._peak:
            row["perf/mfu"] = rate * self._flops / self._peak
        return row

    def memory(self) -> dict[str, Any]:
        """Peak bytes of one device: measured where the device counts them, else of the compiled program."""
        measured = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if measured is not None:
            return {"peak_bytes": measured, "peak_bytes_source": "device"}
        return {"peak_bytes": self._program_bytes, "peak_bytes_source": "program"}

    def summary(self, batch_size: int) -> dict[str, Any]:
        """Medians over the run."""
        rate = statistics.median(self._rates) if self._rates else None
        return {
            "compile_sec": self.compile_sec,
            "steps_per_sec": rate,
            "step_ms": 1000 / rate if rate else None,
            "examples_per_sec": rate * batch_size if rate else None,
            "flops_per_step": self._flops,
            "mfu": rate * self._flops / self._peak if rate and self._flops and self._peak else None,
        }
