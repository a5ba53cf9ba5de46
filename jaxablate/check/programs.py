"""The program of an arm: traced, so that its shapes and kernels are known, and compiled if it shall run."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxablate import sharding, xla
from jaxablate.config import Cohort, MeshConfig, RunConfig, import_task
from jaxablate.data import Batch
from jaxablate.member import Member
from jaxablate.program import Program
from jaxablate.task import Stage, Task, Variables
from jaxablate.trees import flat
from jaxablate_kernels.dispatch import kernels_in

PLATFORM = "cpu"
SEED = jax.ShapeDtypeStruct((), np.int32)


class Observed(Program):
    """The program of a run whose step also shows the gradient that it takes."""

    def _gradient(
        self, state: Any, batch: Batch, rngs: jax.Array, base: Variables
    ) -> tuple[jax.Array, Any, Any, Any]:
        self._taken = super()._gradient(state, batch, rngs, base)
        return self._taken

    def step(self, params: Any, collections: Any, member: Member, batch: Batch, base: Variables) -> Any:
        """The stage's first update, from these variables: (new params, new collections, metrics, gradient)."""
        state = self._start(params, collections)
        new, metrics = self.member_step(state, member, batch, jnp.int32(self.first + 1), base)
        return new.params, new.collections, metrics, self.__dict__.pop("_taken")[3]

    def trace(self) -> jax.stages.Traced:
        """`step` for the run's shapes."""
        state = self.abstract_member
        size = self.cohort.base.training.batch_size
        batch = {
            key: jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for key, x in self.task.example().items()
        }
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.abstract_base)
        return jax.jit(self.step).trace(state.params, state.collections, self.one_member, batch, base)

    @property
    def one_member(self) -> Member:
        """Seed and rates of the run."""
        return jax.tree.map(lambda x: np.asarray(x)[0], self.member)


@dataclass(frozen=True)
class Built:
    """What is known of an arm's program before anything runs."""

    run: RunConfig[Any, Any]
    task: Task[Any, Any]
    programs: tuple[Observed, ...]  # one per stage
    traced: tuple[jax.stages.Traced, ...]
    params: Mapping[str, jax.ShapeDtypeStruct]  # by path
    kernels: frozenset[str]  # names that occur in the steps
    recorded: tuple[str, ...]  # metrics of a step
    text: str  # digest of the steps' programs: equal ones compute the same

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The parts of the run."""
        return tuple(program.stage for program in self.programs)

    @property
    def parameters(self) -> int:
        """Number of parameters, with those of the base."""
        return sum(int(np.prod(x.shape)) for x in self.params.values()) + self.task.base_parameters

    @property
    def step_flops(self) -> float:
        """Floating-point operations of one update, as the task counts them, else 6 per parameter and token."""
        flops = self.task.flops_per_example
        if flops is None:
            flops = 6.0 * self.parameters * max(self.task.tokens_per_example, 1)
        return flops * self.run.training.batch_size


def build(run: RunConfig[Any, Any]) -> Built:
    """Makes the task and traces one step of every stage; allocates nothing."""
    task = import_task(run.task)(run, PLATFORM)
    rows = run.training.batch_size // run.accumulation
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), 1, rows, jax.local_devices(backend=PLATFORM)[:1])
    programs, first = [], 0
    for stage in task.stages():
        programs.append(Observed(task, Cohort((run,)), stage, mesh, first))
        first += stage.steps
    traced = tuple(program.trace() for program in programs)
    metrics = traced[0].out_info[2]
    return Built(
        run=run,
        task=task,
        programs=tuple(programs),
        traced=traced,
        params=flat(programs[0].abstract_member.params),
        kernels=frozenset().union(*(kernels_in(t.jaxpr) for t in traced)),
        recorded=tuple(key for key in metrics if key != "diverged_at"),
        text=hashlib.sha256("".join(t.lower().as_text() for t in traced).encode()).hexdigest()[:16],
    )


class Compiler:
    """Compiles quickly rather than well, and equal programs once, beside the Python of other threads.

    Whoever works in a thread holds `python`, and only compiling and running let go of it. Tracing would gain
    nothing from a second thread, and CPython's `ast`, which numpy reads headers with, breaks under two.
    """

    def __init__(self) -> None:
        self.python = threading.Lock()
        self._programs: dict[Any, tuple[threading.Lock, list[jax.stages.Compiled]]] = {}

    def init(self, task: Task[Any, Any]) -> Callable[[np.int32], Any]:
        """`seed -> variables`."""
        traced = jax.jit(lambda seed: nn.unbox(task.init(jax.random.key(seed))))
        return self._run(self._compile(traced.lower(SEED)))

    def step(self, traced: jax.stages.Traced) -> Callable[..., Any]:
        """The compiled step."""
        return self._run(self._compile(traced.lower()))

    def evaluate(
        self, function: Callable[[Variables, Batch], Any], base: Variables
    ) -> Callable[[Any, Any, Batch], Any]:
        """`params, collections, batch -> outputs` of a task's function, compiled for each shape of batch."""
        traced = jax.jit(
            lambda params, collections, batch, base: function(
                {"params": params, **collections, **base}, batch
            )
        )
        known: dict[Any, jax.stages.Compiled] = {}

        def evaluate(params: Any, collections: Any, batch: Batch) -> Any:
            key = shapes(batch)
            if key not in known:
                known[key] = self._compile(traced.lower(params, collections, batch, base))
            return self._run(known[key])(params, collections, batch, base)

        return evaluate

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Arms that differ in how they compute often start the same, and a study has arms that do not differ."""
        key = (lowered.as_text(), lowered.in_tree, lowered.out_tree)
        lock, made = self._programs.setdefault(key, (threading.Lock(), []))
        with self._let_go(), lock:
            if not made:
                made.append(lowered.compile(compiler_options=xla.quick()))
        return made[0]

    def _run(self, compiled: jax.stages.Compiled) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self._let_go():
                return jax.device_get(compiled(*args))

        return run

    @contextlib.contextmanager
    def _let_go(self) -> Iterator[None]:
        self.python.release()
        try:
            yield
        finally:
            self.python.acquire()


def shapes(batch: Batch) -> tuple[Any, ...]:
    """What a program is compiled for."""
    return tuple((key, np.shape(batch[key]), str(batch[key].dtype)) for key in sorted(batch))
