"""The compiled program of a cohort: init, one training step, one evaluation batch.

Every function is written for one member, and `Program` carries it to all; a single run is a cohort of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxablate import distributed, sharding, turns, xla
from jaxablate.config import Cohort, RunConfig
from jaxablate.data import Batch
from jaxablate.inputs import abstract_base
from jaxablate.member import Member, MemberProgram, State, chosen, keeping, restored
from jaxablate.nn.layout import laid_out_on
from jaxablate.plateau import Judged, Standing
from jaxablate.task import Stage, Task, Variables
from jaxablate.trees import Axes, flat, is_boxed

Members = Literal["together", "in turn"]


class Program(MemberProgram):
    """Compiled functions of one cohort and stage on one mesh; `first` updates were done before the stage.

    The mesh may be of devices that are not there (`targets`): making and lowering a program touch none.
    `members` says how a step goes through them: by `vmap`, or in turn, which a CPU by itself is faster with. Where
    members may stop before the others, a turn passes over those that rest (see `turns`).

    Attributes:
      base: the arrays of the task's base on the mesh (see `inputs`), once for all members. To lower and compile a
        program needs none; whoever runs it gives it them, here or later.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        cohort: Cohort,
        stage: Stage,
        mesh: Mesh,
        first: int = 0,
        members: Members | None = None,
        base: Variables | None = None,
    ):
        super().__init__(task, cohort.base, stage, first)
        one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self.members: Members = members or ("in turn" if one_cpu else "together")
        self.cohort, self.mesh = cohort, mesh
        self.base: Variables = {} if base is None else base
        self.abstract_base = abstract_base(task, mesh)
        runs = cohort.runs
        self._members = Member(
            seed=np.array([r.seed for r in runs], np.int32),
            learning_rate=self._rates("learning_rate"),
            weight_decay=self._rates("weight_decay"),
        )
        one = jax.eval_shape(self._start_boxed, task.abstract)
        self.abstract_member: State = nn.unbox(one)
        self.state_sharding: State = jax.tree.map(
            lambda axes, leaf: sharding.state_sharding(mesh, axes.names, (len(runs), *leaf.shape)),
            jax.tree.map(Axes.of, one, is_leaf=is_boxed),
            self.abstract_member,
        )
        self._passes_over = self.members == "in turn" and self.policy is not None and len(runs) > 1
        self._predict = jax.jit(self._of_those_asked(self._member_predict))
        self._conclude = jax.jit(self._of_those_asked(self._member_conclude))
        self._judge = jax.jit(self._judge_all, donate_argnums=0, out_shardings=self.state_sharding)
        self._slice = jax.jit(
            lambda state, m: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, 0, keepdims=False), state),
            out_shardings=self.member_sharding(),
        )

    # ------------------------------------------------------------------------------ whole cohort

    def init(self) -> State:
        """The state before the first step; each member's from its own seed alone.

        One member at a time: mapped over members the same numbers could round apart in another cohort.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        start = jax.jit(
            lambda seed: nn.unbox(self._start_boxed(self.task.init(jax.random.key(seed)))),
            out_shardings=self.member_sharding(),
            # It runs once a member: optimising it would mostly take seconds to save milliseconds.
            compiler_options=dict(xla.quick(self.task.init_effort)) if on_cpu else None,
        )
        made = (start(np.int32(run.seed)) for run in self.cohort.runs)
        if self.mesh.size > 1 or len(self.cohort.runs) == 1:
            return self.stack([flat(one) for one in made])
        return self._put_one_by_one(made)

    def _put_one_by_one(self, members: Iterable[State]) -> State:
        """The cohort's state from its members', of which one at a time is held beside it."""
        put = jax.jit(
            lambda states, one, m: jax.tree.map(
                lambda x, y: lax.dynamic_update_index_in_dim(x, y, m, 0), states, one
            ),
            donate_argnums=0,
        )
        states = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.abstract_state())
        for m, one in enumerate(members):
            states = put(states, one, np.int32(m))
        return states

    def carry(self, previous: State) -> State:
        """The state at the start of this stage: what the one before was evaluated with, and an optimiser.

        That is the average of its parameters, if it kept one. The optimiser is new, or that of the stage before where
        the stage says so.
        """
        fresh = jax.jit(
            jax.vmap(lambda s: self._start(s.ema or s.params, s.collections)),
            out_shardings=self.state_sharding,
        )(previous)
        return replace(
            fresh,
            opt_state=previous.opt_state if self.stage.optimizer == "kept" else fresh.opt_state,
            alive=previous.alive,
            diverged_at=previous.diverged_at,
            last_loss=previous.last_loss,
            stability=previous.stability,
        )

    @cached_property
    def member(self) -> Member:
        """What the members differ in, on the devices."""
        return distributed.put(self._members, NamedSharding(self.mesh, PartitionSpec("member")))

    def compile_step(self, batch: Batch | None = None) -> Step:
        """The step ahead of time, for batches like this one, which may be abstract; default: of full size."""
        return Step(self, self.lower_step(batch).compile())

    def lower_step(self, batch: Batch | None = None) -> jax.stages.Lowered:
        """The step as the compiler is given it."""
        each = NamedSharding(self.mesh, PartitionSpec("member"))
        member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each), self._members)
        step = jax.jit(
            self._step_all,
            donate_argnums=0,
            out_shardings=(self.state_sharding, NamedSharding(self.mesh, PartitionSpec("member"))),
            compiler_options=xla.reproducible(self.mesh.devices.flat[0].platform),
        )
        batch = self.abstract_batch() if batch is None else batch
        with self._layout():
            return step.lower(self.abstract_state(), member, batch, np.int32(1), self.abstract_base)

    def lower_predict(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """`predict` for evaluation batches of these shapes, as the compiler is given it."""
        rows = next(iter(batch.values())).shape[0]
        placed = sharding.batch_sharding(self.mesh, rows, per_member=False)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for k, x in batch.items()}
        with self._layout():
            return self._predict.lower(
                self._all_members(), self.abstract_state(), abstract, self.abstract_base
            )

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the cohort's state."""
        members = len(self.cohort.runs)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=s),
            self.abstract_member,
            self.state_sharding,
        )

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of the cohort's training batch."""
        lead = (len(self.cohort.runs), self.cohort.base.training.batch_size)
        placed = sharding.batch_sharding(self.mesh, lead[1], per_member=True)
        example = self.task.example()
        return {
            k: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype, sharding=placed) for k, s in example.items()
        }

    def put_batch(self, batch: Batch) -> Batch:
        """A training batch (members, examples, …) on the devices; keys that the task does not train on stay out."""
        placed = sharding.batch_sharding(self.mesh, self.cohort.base.training.batch_size, per_member=True)
        return distributed.put({k: batch[k] for k in self.task.example()}, placed)

    def predict(self, state: State, batch: Batch, asked: np.ndarray | None = None) -> Any:
        """The task's outputs for one evaluation batch, of every member; the average is used if one is kept.

        Args:
          asked: bool (members,): whose outputs are looked at; those of others may be anything. None: all.
        """
        return self._evaluate(self._predict, state, batch, asked)

    def conclude(self, state: State, batch: Batch, asked: np.ndarray | None = None) -> Any:
        """As `predict`, of one closing batch."""
        return self._evaluate(self._conclude, state, batch, asked)

    def abstract_conclude(self, state: State, batch: Batch) -> Any:
        """What `conclude` gives, as shapes and dtypes: leaves (members, …)."""
        with self._layout():
            return jax.eval_shape(self._conclude, self._all_members(), state, dict(batch), self.base)

    def _evaluate(
        self, compiled: Callable[..., Any], state: State, batch: Batch, asked: np.ndarray | None
    ) -> Any:
        rows = len(next(iter(batch.values())))
        placed = distributed.put(dict(batch), sharding.batch_sharding(self.mesh, rows, per_member=False))
        with self._layout():
            return compiled(self._all_members() if asked is None else asked, state, placed, self.base)

    def _all_members(self) -> np.ndarray:
        return np.ones(len(self.cohort.runs), bool)

    def judge(self, state: State, responses: Sequence[float], n: int) -> State:
        """The state after an evaluation at step `n`, with a response for every member; `state` is consumed.

        Those of members that do not train are not looked at.
        """
        if self.policy is None:
            return state
        values = distributed.put(
            np.array(responses, np.float32), NamedSharding(self.mesh, PartitionSpec("member"))
        )
        return self._judge(state, values, np.int32(n))

    def training(self, state: State) -> np.ndarray:
        """Which members still train: bool (members,). The others diverged or have stopped."""
        alive = distributed.fetch(state.alive)
        return alive if state.control is None else alive & (distributed.fetch(state.control.stopped_at) < 0)

    def standings(self, state: State) -> list[Standing | None]:
        """How each member stands in this stage; None if nothing follows from its responses."""
        if state.control is None:
            return [None] * len(self.cohort.runs)
        control = state.control
        told = distributed.fetch((control.stopped_at, control.best_at, control.best))
        return [
            Standing(int(at) if at >= 0 else None, int(best_at), float(best), self.first)
            for at, best_at, best in zip(*told, strict=True)
        ]

    def _layout(self) -> contextlib.AbstractContextManager[None]:
        return laid_out_on(self.mesh)

    def _of_all(self, f: Callable[..., Any], own: int) -> Callable[..., Any]:
        """A function of one member, for all of them; its first `own` arguments are the member's own."""
        if self.members == "in turn":
            return turns.in_turn(f, own, len(self.cohort.runs))

        def together(*args: Any) -> Any:
            axes = (0,) * own + (None,) * (len(args) - own)
            return jax.vmap(f, in_axes=axes, spmd_axis_name="member")(*args)

        return together

    def _of_those_asked(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f(state, …)` of all members, or of those alone that the first argument names, where that is faster."""
        if self._passes_over:
            return turns.of_some(f, own=1)
        return lambda _, *args: self._of_all(f, own=1)(*args)

    def _step_all(self, state: State, member: Member, batch: Batch, n: Any, base: Variables) -> Any:
        if not self._passes_over:
            return self._of_all(self.member_step, own=3)(state, member, batch, n, base)
        step = turns.changing_some(self.member_step, own=3)
        state, metrics = step(_trains(state), state, member, batch, n, base)
        return state, {**metrics, "diverged_at": state.diverged_at}  # of those that rest as well

    def _judge_all(self, state: State, responses: jax.Array, n: Any) -> State:
        assert self.policy is not None
        assert state.control is not None
        told = replace(state.control, kept={})
        judged: Judged = self._of_all(self._member_judge, own=3)(told, state.alive, responses, n)
        state = replace(state, control=replace(judged.control, kept=state.control.kept))
        if self.policy.restore == "last":
            return state
        state = self._changed(judged.better, keeping, state)
        return self._changed(judged.ends, restored, state)

    def _changed(self, which: jax.Array, change: Callable[[State], State], state: State) -> State:
        """The state with those members changed that `which`, bool (members,), names."""
        if self._passes_over:
            return turns.changing_some(lambda one: (change(one), ()), own=1)(which, state)[0]
        return self._of_all(lambda this, one: chosen(this, change(one), one), own=2)(which, state)

    # --------------------------------------------------------------------------- one member's state

    def _rates(self, name: str) -> np.ndarray:
        """A rate of the stage for each member: what the stage has in a task of the member's own config.

        So in a cohort a member has the rates that it has by itself.
        """

        def own(run: RunConfig[Any, Any]) -> float:
            if getattr(run.optim, name) == getattr(self.task.config.optim, name):
                return getattr(self.stage.optim, name)
            stages = type(self.task)(run, self.task.platform).stages()
            (stage,) = (stage for stage in stages if stage.name == self.stage.name)
            return getattr(stage.optim, name)

        return np.array([own(run) for run in self.cohort.runs], np.float32)

    def member_sharding(self) -> State:
        """Sharding of one member's state: the cohort's without its first axis."""
        return jax.tree.map(
            lambda s: NamedSharding(self.mesh, PartitionSpec(*s.spec[1:])), self.state_sharding
        )

    def take(self, state: State, m: int) -> dict[str, jax.Array]:
        """One member's state as a flat dict, path -> array, which is what a checkpoint holds."""
        return flat(self._slice(state, np.int32(m)))

    def abstract_checkpoint(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `take` gives, abstractly: the target of a restore."""
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract_member,
            self.member_sharding(),
        )
        return flat(target)

    def stack(self, members: list[dict[str, jax.Array]]) -> State:
        """The cohort's state from its members' checkpoints."""
        tree = jax.tree.structure(self.abstract_member)
        states = [jax.tree.unflatten(tree, list(m.values())) for m in members]
        join = jax.jit(
            lambda *xs: jax.tree.map(lambda *x: jnp.stack(x), *xs), out_shardings=self.state_sharding
        )
        return join(*states)


def _trains(state: State) -> jax.Array:
    """Which members of a cohort neither diverged nor have stopped: bool (members,)."""
    assert state.control is not None
    return state.alive & (state.control.stopped_at < 0)


@dataclass(frozen=True)
class Step:
    """`step(state, member, batch, n) -> (state, metrics)`, compiled; `state` is consumed."""

    program: Program
    compiled: jax.stages.Compiled

    def __call__(
        self, state: State, member: Member, batch: Batch, n: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        return self.compiled(state, member, batch, n, self.program.base)
