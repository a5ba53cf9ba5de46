"""A training step in PyTorch on one batch, over and over, and how it is timed: what the benchmarks compete with.

AdamW, fused on a GPU, after clipping by the global norm; an average of the parameters if the config keeps one.
Parameters are float32; in bfloat16 the model runs under autocast.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxablate.config import OptimConfig

torch: Any = importlib.import_module("torch")  # no dependency, so type checkers need not find it

Precision = Literal["float32", "bfloat16"]
# Names of `--torch` -> arguments of `torch.compile`; None: not compiled.
MODES: Mapping[str, Mapping[str, Any] | None] = {
    "eager": None,
    "compile": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class TorchStep:
    """A training step of the parameters that ask for a gradient.

    Args:
      model: on the device; called with the batch it gives the loss.
      batch: tensors on the device.
      mode: a key of `MODES`.
    """

    def __init__(self, model: Any, optim: OptimConfig, batch: Sequence[Any], precision: Precision, mode: str):
        self._all = list(model.parameters())
        self._device = self._all[0].device
        self._parameters = [p for p in self._all if p.requires_grad]
        matrices = [p for p in self._parameters if p.ndim > 1]
        others = [p for p in self._parameters if p.ndim <= 1]
        spared = {} if optim.decay == "all" else {"weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, **spared}],
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._mode, self._clip_norm, self._decay = mode, optim.clip_norm, optim.ema_decay
        self._average = [p.detach().clone() for p in self._parameters] if self._decay else []
        self._autocast = precision == "bfloat16"
        arguments = MODES[mode]
        self._loss = model if arguments is None else torch.compile(model, fullgraph=True, **arguments)
        self._batch = tuple(batch)
        self.grad_norm: Any = None  # of the last step, before clipping

    def __call__(self) -> Any:
        """One update; the loss before it."""
        if self._mode in CUDA_GRAPHS:  # what the last step gave is no longer needed
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._loss(*self._batch)
        loss.backward()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self._average:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def clock(self, call: Callable[[], Any], inner: int) -> float:
        """Seconds of `inner` calls, until the device has done them: as `bench.timing.wall_clock` does for jax."""
        began = time.perf_counter()
        for _ in range(inner):
            call()
        self._wait()
        return time.perf_counter() - began

    def peak_bytes(self) -> int | None:
        """The most that the allocator of a GPU gave out during one more step; other models' memory is not in it."""
        if self._device.type != "cuda":
            return None
        self._wait()
        mine = sum(x.nbytes for x in self._held())
        others = torch.cuda.memory_allocated() - mine
        torch.cuda.reset_peak_memory_stats()
        self()
        self._wait()
        return torch.cuda.max_memory_allocated() - others

    def _held(self) -> Iterator[Any]:
        """What lies on the device between steps."""
        yield from (*self._all, *self._average, *self._batch)
        for state in self._optimizer.state.values():
            yield from (x for x in state.values() if torch.is_tensor(x) and x.device == self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def device(backend: str) -> Any:
    """PyTorch's device for a backend of jax, `cpu` or `gpu`; float32 is multiplied there as jax does it.

    jax's default on a GPU is TF32, on a CPU float32.

    Raises:
      RuntimeError: PyTorch cannot use it.
    """
    if backend == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU")
    torch.set_float32_matmul_precision("high" if backend == "gpu" else "highest")
    return torch.device("cuda" if backend == "gpu" else backend)


def take(model: Any, found: Mapping[str, np.ndarray]) -> None:
    """Sets all parameters of a model.

    Raises:
      ValueError: another parameter than it has, or one is missing.
    """
    own = dict(model.named_parameters())
    if own.keys() != found.keys():
        raise ValueError(f"parameters differ: {sorted(own.keys() ^ found.keys())}")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(torch.tensor(np.asarray(value)))  # raises where shapes differ


def count(model: Any) -> int:
    """Number of the parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
