"""The programs that `bench step` times, and the batch that they run on.

* `step`: the program that the training loop runs, `Program.compile_step`: loss, gradient, update.
* `forward`: the loss of some examples, a micro-batch, and nothing kept for a gradient.
* `backward`: the pullback of that loss, from what its forward pass kept to the gradient of the parameters. The
  forward pass of `jax.vjp` is compiled apart and not timed; what remat computes again is part of the pullback.

A micro-batch is as large as the smallest that an arm's step has: without accumulation it is the batch. Each program is
of all members of the cohort.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate import config, data, sharding
from jaxablate.bench.timing import Call, Clock
from jaxablate.config import Cohort, RunConfig, canonical, import_task
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.member import Member
from jaxablate.program import Program, State, Step
from jaxablate.task import Task, Variables


class StepProgram(Program):
    """The program of a run whose forward and backward passes can be had apart from its update.

    `rows`: examples of a micro-batch, which these passes are of.
    """

    rows: int

    def put_micro(self, batch: Batch) -> Batch:
        """The first examples of a training batch, on the devices."""
        placed = sharding.batch_sharding(self.mesh, self.rows, per_member=True)
        return jax.device_put({k: batch[k][:, : self.rows] for k in self.task.example()}, placed)

    def member_loss(
        self, params: Any, state: State, member: Member, micro: Batch, base: Variables
    ) -> jax.Array:
        """The loss of one micro-batch of one member, with the noise of the first update."""
        rng = jax.random.fold_in(jax.random.key(member.seed), self.first + 1)
        variables = {"params": params, **state.collections, **base}
        features, _ = self.task.encode(variables, micro, jax.random.split(rng, self.rows))
        return self.task.loss(variables, features)[0]

    def forward(self, state: State, member: Member, micro: Batch, base: Variables) -> jax.Array:
        """The loss of each member."""
        one = self._of_all(lambda s, *others: self.member_loss(s.params, s, *others), own=3)
        return one(state, member, micro, base)

    def linearized(
        self, state: State, member: Member, micro: Batch, base: Variables
    ) -> tuple[jax.Array, Any]:
        """The loss of each member, and its pullback with what that needs."""

        def one(s: State, *others: Any) -> tuple[jax.Array, Any]:
            return jax.vjp(lambda params: self.member_loss(params, s, *others), s.params)

        return self._of_all(one, own=3)(state, member, micro, base)

    def backward(self, pullback: Any, cotangent: jax.Array) -> Any:
        """The gradient of the parameters that the stage trains."""

        def one(pull: Any, ct: jax.Array) -> Any:
            (grads,) = pull(ct)
            if self.trained is True:
                return grads
            return jax.tree.map(lambda g, trained: g if trained else jnp.zeros_like(g), grads, self.trained)

        return self._of_all(one, own=2)(pullback, cotangent)

    def compile(self, function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
        """One of the above for these arguments."""
        with self._layout():
            return jax.jit(function).lower(*args).compile()


def make_program(run: RunConfig[Any, Any], stage: str = "", members: int = 1) -> StepProgram:
    """The program of one stage of a run, on the devices that its config asks for; allocates nothing.

    Args:
      stage: its name; empty for the first.
      members: of the cohort; they differ in the seed.

    Raises:
      UserError: the config cannot be carried out here, or its task has no such stage.
    """
    task = import_task(run.task)(run, jax.default_backend())
    stages = task.stages()
    names = [own.name for own in stages]
    if stage and stage not in names:
        raise UserError(f"--stage={stage}: there is no such stage; valid: {', '.join(names)}")
    at = names.index(stage) if stage else 0
    first = sum(before.steps for before in stages[:at])
    mesh = sharding.make_mesh(run.host.mesh, members, run.training.batch_size // run.accumulation)
    return StepProgram(task, differing_in_seed(run, members), stages[at], mesh, first)


def differing_in_seed(run: RunConfig[Any, Any], members: int) -> Cohort:
    """A run and as many more as make a cohort of `members`, with the seeds that follow."""
    return Cohort(tuple(replace(run, seed=run.seed + n) for n in range(members)))


class Runnable:
    """An arm's compiled programs with their state and batch, on the devices."""

    def __init__(self, built: StepProgram, step: Step, batch: Batch, whats: Sequence[str]):
        self._program, self._compiled = built, step
        self._state, self._batch = built.init(), built.put_batch(batch)
        self._micro = built.put_micro(batch) if set(whats) - {"step"} else None
        if "forward" in whats:
            self._loss = built.compile(built.forward, *self._arguments)
        if "backward" in whats:
            self._linearized = built.compile(built.linearized, *self._arguments)
            loss, pullback = self._linearized(*self._arguments)
            self._one = jnp.ones_like(loss)
            self._pull = built.compile(built.backward, pullback, self._one)

    def call(self, what: str) -> Call:
        """Runs one of its programs."""
        return {"step": self._step, "forward": self._forward, "backward": self._backward}[what]

    def clock(self, what: str) -> Clock | None:
        """How to time a program that is not simply called."""
        return self._time_backward if what == "backward" else None

    @property
    def _arguments(self) -> tuple[Any, ...]:
        return self._state, self._program.member, self._micro, self._program.base

    def _step(self) -> Any:
        # The state is consumed, so the next step goes on from this one's: the work is the same.
        n = np.int32(self._program.first + 1)
        self._state, metrics = self._compiled(self._state, self._program.member, self._batch, n)
        return metrics

    def _forward(self) -> jax.Array:
        return self._loss(*self._arguments)

    def _backward(self) -> Any:
        return self._pull(self._linearized(*self._arguments)[1], self._one)

    def _time_backward(self, call: Call, inner: int) -> float:
        """Seconds of the pullback alone; what it needs is made anew, since that of all arms at once may not fit.

        Each is waited for, so that a launch is part of it, which calls that queue up would hide.
        """
        del call
        seconds = 0.0
        for _ in range(inner):
            _, pullback = jax.block_until_ready(self._linearized(*self._arguments))
            began = time.perf_counter()
            jax.block_until_ready(self._pull(pullback, self._one))
            seconds += time.perf_counter() - began
        return seconds


class Batches:
    """One training batch for each kind of data that the arms have: the task's own, or made up.

    `members`: whose batches it holds, each in the order of its own seed.
    """

    def __init__(self, source: Literal["real", "synthetic"], members: int = 1):
        self._source, self._members = source, members
        self._known: dict[str, Batch] = {}
        self._said: list[str] = []

    @property
    def words(self) -> str:
        """What the batches are."""
        return "; ".join(dict.fromkeys(self._said))

    def of(self, task: Task[Any, Any]) -> Batch:
        """Arrays (members, examples, …) for the training step of a task."""
        run = task.config
        key = canonical([run.task, run.to_dict()["data"], run.training.batch_size, run.training.order])
        if key not in self._known:
            self._known[key] = self._read(task)
        return self._known[key]

    def _read(self, task: Task[Any, Any]) -> Batch:
        run = task.config
        if self._source == "synthetic":
            self._said.append("made up, as --synthetic asks for")
            return made_up(task, self._members)
        try:
            source = task.open(config.cache_dir(run.host))
            size, order = run.training.batch_size, run.training.order
            seeds = range(run.seed, run.seed + self._members)
            batch = data.CohortBatches(task.data_of_stage(source).train, seeds, size, 1, order)[0]
        except UserError as error:
            self._said.append(f"made up, since the task's data cannot be had: {error}")
            return made_up(task, self._members)
        self._said.append(f"the task's own ({source.fingerprint})")
        return batch


def made_up(task: Task[Any, Any], members: int = 1) -> Batch:
    """A batch (members, examples, …) of the right shapes: positive numbers, and of whole ones zeros and ones.

    Positive, since a quantity such as a viscosity has a logarithm, and of a loss that is NaN nothing would be timed.
    """
    draw, size = np.random.default_rng(0), task.config.training.batch_size

    def array(like: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (members, size, *like.shape)
        if jnp.issubdtype(like.dtype, jnp.floating):
            return np.abs(draw.standard_normal(shape, np.float32)).astype(like.dtype)
        return draw.integers(0, 2, shape).astype(like.dtype)  # few indices are valid whatever they index

    return {key: array(like) for key, like in task.example().items()}
