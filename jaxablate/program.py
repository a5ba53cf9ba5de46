"""The compiled program of a cohort: init, one training step, one evaluation batch.

Every function is written for one member, and `Program` carries it to all; a single run is a cohort of one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxablate import distributed, optim, sharding, xla
from jaxablate.config import Cohort
from jaxablate.data import Batch
from jaxablate.nn.layout import laid_out_on
from jaxablate.plateau import Control, Policy, Standing
from jaxablate.stability import Stability
from jaxablate.task import Stage, Task, Variables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Member:
    """What the members of a cohort differ in; one entry per member."""

    seed: Any
    learning_rate: Any
    weight_decay: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes. In a cohort every leaf has the member axis first."""

    params: Any
    collections: Any  # Flax collections other than params
    opt_state: Any
    ema: Any  # average of params, or empty
    alive: Any  # bool: no loss has been non-finite so far
    diverged_at: Any  # int32: the step that was not finite, or -1
    last_loss: Any  # float32: the newest finite loss
    stability: Stability
    control: Control | None  # what follows from the responses; None if nothing does


Members = Literal["together", "in turn"]


class Program:
    """Compiled functions of one cohort and stage on one mesh; `first` updates were done before the stage.

    The mesh may be of devices that are not there (`targets`): making and lowering a program touch none.
    `members` says how a step goes through them: by `vmap`, or in turn, which a CPU by itself is faster with.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        cohort: Cohort,
        stage: Stage,
        mesh: Mesh,
        first: int = 0,
        members: Members | None = None,
    ):
        one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self.members: Members = members or ("in turn" if one_cpu else "together")
        self.task, self.cohort, self.stage, self.mesh, self.first = (
            task.during(stage),
            cohort,
            stage,
            mesh,
            first,
        )
        self.end = first + stage.steps
        self.policy = Policy.of(task, stage, first)
        runs = cohort.runs
        self._members = Member(
            seed=np.array([r.seed for r in runs], np.int32),
            learning_rate=self._rates("learning_rate"),
            weight_decay=self._rates("weight_decay"),
        )
        chosen = jax.tree_util.tree_map_with_path(
            lambda path, _: stage.trains(path_name(path)), task.abstract["params"], is_leaf=_is_boxed
        )
        self.trained = True if all(jax.tree.leaves(chosen)) else chosen
        one = jax.eval_shape(self._start_boxed, task.abstract)
        logical = jax.tree.map(_Axes.of, one, is_leaf=_is_boxed)
        self.abstract_member: State = nn.unbox(one)
        self.state_sharding: State = jax.tree.map(
            lambda axes, leaf: sharding.state_sharding(mesh, axes.names, (len(runs), *leaf.shape)),
            logical,
            self.abstract_member,
        )
        # An axis of stacked layers does not make a bias a matrix.
        ranks = jax.tree.map(lambda axes: len([a for a in axes.names if a != "layers"]), logical.params)
        self._mask = optim.decay_mask(stage.optim, ranks)
        self._predict = jax.jit(self._of_all(self._member_predict, own=1))
        self._judge = jax.jit(
            self._of_all(self._member_judge, own=2), donate_argnums=0, out_shardings=self.state_sharding
        )
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
            # It runs once a member: optimising it would take seconds to save milliseconds.
            compiler_options=dict(xla.quick()) if on_cpu else None,
        )
        return self.stack([flat(start(np.int32(run.seed))) for run in self.cohort.runs])

    def carry(self, previous: State) -> State:
        """The state at the start of this stage: what the one before was evaluated with, and a new optimiser.

        That is the average of its parameters, if it kept one.
        """
        fresh = jax.jit(
            jax.vmap(lambda s: self._start(s.ema or s.params, s.collections)),
            out_shardings=self.state_sharding,
        )(previous)
        return replace(
            fresh,
            alive=previous.alive,
            diverged_at=previous.diverged_at,
            last_loss=previous.last_loss,
            stability=previous.stability,
        )

    @cached_property
    def member(self) -> Member:
        """What the members differ in, on the devices."""
        return distributed.put(self._members, NamedSharding(self.mesh, PartitionSpec("member")))

    def compile_step(self) -> jax.stages.Compiled:
        """`step(state, member, batch, n) -> (state, metrics)`, ahead of time; `state` is consumed."""
        return self.lower_step().compile()

    def lower_step(self) -> jax.stages.Lowered:
        """The step as the compiler is given it."""
        each = NamedSharding(self.mesh, PartitionSpec("member"))
        member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each), self._members)
        step = jax.jit(
            self._of_all(self.member_step, own=3),
            donate_argnums=0,
            out_shardings=(self.state_sharding, NamedSharding(self.mesh, PartitionSpec("member"))),
            compiler_options=xla.reproducible(self.mesh.devices.flat[0].platform),
        )
        with self._layout():
            return step.lower(self.abstract_state(), member, self.abstract_batch(), np.int32(1))

    def lower_predict(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Lowered:
        """`predict` for evaluation batches of these shapes, as the compiler is given it."""
        rows = next(iter(batch.values())).shape[0]
        placed = sharding.batch_sharding(self.mesh, rows, per_member=False)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for k, x in batch.items()}
        with self._layout():
            return self._predict.lower(self.abstract_state(), abstract)

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

    def predict(self, state: State, batch: Batch) -> Any:
        """The task's outputs for one evaluation batch, of every member; the average is used if one is kept."""
        rows = len(next(iter(batch.values())))
        placed = distributed.put(dict(batch), sharding.batch_sharding(self.mesh, rows, per_member=False))
        with self._layout():
            return self._predict(state, placed)

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
            Standing(int(at) if at >= 0 else None, int(best_at), float(best))
            for at, best_at, best in zip(*told, strict=True)
        ]

    def _layout(self) -> contextlib.AbstractContextManager[None]:
        return laid_out_on(self.mesh)

    def _of_all(self, f: Callable[..., Any], own: int) -> Callable[..., Any]:
        """A function of one member, for all of them; its first `own` arguments are the member's own."""
        if self.members == "together":

            def together(*args: Any) -> Any:
                axes = (0,) * own + (None,) * (len(args) - own)
                return jax.vmap(f, in_axes=axes, spmd_axis_name="member")(*args)

            return together

        def in_turn(*args: Any) -> Any:
            """One member's arrays stay in the caches, where all members' side by side do not."""

            def one(_: None, mine: tuple[Any, ...]) -> tuple[None, Any]:
                return None, f(*mine, *args[own:])

            return lax.scan(one, None, args[:own], unroll=len(self.cohort.runs) == 1)[1]

        return in_turn

    # --------------------------------------------------------------------------- one member's state

    def _rates(self, name: str) -> np.ndarray:
        """A rate of the stage for each member, in the ratio that the member's config has to the task's."""
        stage, base = getattr(self.stage.optim, name), getattr(self.task.config.optim, name)
        own = [getattr(run.optim, name) for run in self.cohort.runs]
        return np.array([rate if stage == base else rate * stage / base for rate in own], np.float32)

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

    # ------------------------------------------------------------------------------- for one member

    def _start_boxed(self, variables: Variables) -> State:
        return self._start(variables["params"], {k: v for k, v in variables.items() if k != "params"})

    def _start(self, params: Any, collections: Any) -> State:
        optimizer = optim.transform(self.stage.optim, True, 0.0, 0.0, self.trained)
        ema = jax.tree.map(jnp.array, params) if self.stage.optim.ema_decay else {}
        return State(
            params=params,
            collections=collections,
            opt_state=optimizer.init(params),
            ema=ema,
            alive=jnp.array(True),
            diverged_at=jnp.int32(-1),
            last_loss=jnp.float32(jnp.nan),
            stability=Stability.start(),
            control=self.policy and self.policy.start(_variables(params, collections, ema)),
        )

    def member_step(
        self, state: State, member: Member, batch: Batch, n: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """Update `n` (from 1) of one member; a step that is not finite leaves the state as it was, for good.

        So does every step after it stopped.
        """
        # Noise is a function of (seed, step) and, inside Flax, of the module path.
        rng = jax.random.fold_in(jax.random.key(member.seed), n)
        rngs = jax.random.split(rng, self.cohort.base.training.batch_size)
        loss, aux, sums, grads = self._gradient(state, batch, rngs)
        if self.trained is not True:  # XLA then drops what only a frozen parameter's gradient needs
            grads = jax.tree.map(lambda g, trained: g if trained else jnp.zeros_like(g), grads, self.trained)
        grad_norm = optax.tree.norm(grads)
        share = optim.schedule(self.stage.optim, self.stage.steps)(n - self.first)
        rate = member.learning_rate * share
        if state.control is not None:
            rate = rate * state.control.share
        optimizer = optim.transform(self.stage.optim, self._mask, rate, member.weight_decay, self.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = self._trained_of(optax.apply_updates(state.params, updates), state.params)
        ok = state.alive & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        moves = ok
        if state.control is not None:  # who has stopped neither moves nor is lost
            stopped = state.control.stopped_at >= 0
            ok, moves = jnp.where(stopped, state.alive, ok), ok & ~stopped
        new = replace(
            state,
            params=params,
            collections=self.task.advance(state.collections, sums),
            opt_state=opt_state,
            ema=self._trained_of(optim.average(self.stage.optim, state.ema, params), state.ema),
            last_loss=loss,
            stability=state.stability.after(n, loss, grad_norm),
        )
        new = jax.tree.map(lambda a, b: jnp.where(moves, a, b), new, state)
        new = replace(new, alive=ok, diverged_at=jnp.where(state.alive & ~ok, n, state.diverged_at))
        metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": rate}
        extra = {f"train/{k}": v for k, v in aux.items()}
        return new, {**metrics, **extra, **new.stability.metrics(), "diverged_at": new.diverged_at}

    def _trained_of(self, new: Any, old: Any) -> Any:
        """`new` parameters, or their average, of what the stage trains; the rest is `old`, and costs nothing."""
        if self.trained is True or not old:
            return new
        return jax.tree.map(lambda n, o, trained: n if trained else o, new, old, self.trained)

    def _gradient(self, state: State, batch: Batch, rngs: jax.Array) -> tuple[jax.Array, Any, Any, Any]:
        """Loss, its extras, sums and the gradient of the whole batch, whatever the accumulation.

        With accumulation the features of all micro-batches are computed first, the loss and its gradient
        with respect to them next, and then each micro-batch again to carry that gradient to the
        parameters (gradient caching, Gao et al. 2021): exact also where the loss couples examples.
        """
        task, parts = self.task, self.cohort.base.accumulation

        def encode(params: Any, micro: Batch, key: jax.Array) -> tuple[Any, Any]:
            return task.encode({"params": params, **state.collections}, micro, key)

        def head(params: Any, features: Any) -> tuple[jax.Array, Any]:
            return task.loss({"params": params, **state.collections}, features)

        if parts == 1:

            def total(params: Any) -> tuple[jax.Array, Any]:
                features, sums = encode(params, batch, rngs)
                loss, aux = head(params, features)
                return loss, (aux, sums)

            (loss, (aux, sums)), grads = jax.value_and_grad(total, has_aux=True)(state.params)
            return loss, aux, sums, grads

        # Micro-batch i takes every parts-th example, so that each holds rows of all data shards.
        micros = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, rngs))
        features, sums = lax.map(lambda micro: encode(state.params, *micro), micros)
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), features)

        def from_real(params: Any, real: list[jax.Array]) -> tuple[jax.Array, Any]:
            waiting = iter(real)  # labels and other whole numbers among the features have no gradient
            return head(params, jax.tree.map(lambda x: next(waiting) if _is_real(x) else x, whole))

        (loss, aux), (grads, pulled) = jax.value_and_grad(from_real, argnums=(0, 1), has_aux=True)(
            state.params, _real(whole)
        )
        pulled = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), pulled)

        def add(grads: Any, part: tuple[tuple[Batch, jax.Array], Any]) -> tuple[Any, None]:
            micro, cotangent = part
            _, pull = jax.vjp(lambda p: _real(encode(p, *micro)[0]), state.params)
            return jax.tree.map(jnp.add, grads, pull(cotangent)[0]), None

        grads, _ = lax.scan(add, grads, (micros, pulled))
        return loss, aux, sums, grads

    def _member_judge(self, state: State, response: jax.Array, n: jax.Array) -> State:
        assert self.policy is not None
        assert state.control is not None
        own = _variables(state.params, state.collections, state.ema)
        control, variables = self.policy.judge(state.control, own, response, n)
        new = replace(state, **variables, control=control)
        trains = state.alive & (state.control.stopped_at < 0)
        return jax.tree.map(lambda a, b: jnp.where(trains, a, b), new, state)

    def _member_predict(self, state: State, batch: Batch) -> Any:
        params = state.ema if self.stage.optim.ema_decay else state.params
        return self.task.predict({"params": params, **state.collections}, batch)


def _variables(params: Any, collections: Any, ema: Any) -> dict[str, Any]:
    """What of a state evaluation depends on, by the state's own names."""
    return {"params": params, "collections": collections, "ema": ema}


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `params/text/words/embedding`, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax as `text/words/embedding`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def digest(arrays: dict[str, Any]) -> str:
    """32 hex digits over names, dtypes, shapes and bits: equal exactly if the arrays are."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        h.update(f"{name}:{value.dtype}:{value.shape}".encode())
        h.update(np.ascontiguousarray(value).tobytes())
    return h.hexdigest()


def count(params: Any) -> int:
    """Number of parameters of one member."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


@dataclass(frozen=True)
class _Axes:
    """Logical names of a leaf's axes; a class of its own, since jax takes tuples apart."""

    names: tuple[str | None, ...]

    @classmethod
    def of(cls, leaf: Any) -> _Axes:
        return cls(leaf.names if _is_boxed(leaf) else (None,) * leaf.ndim)


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _real(features: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(features) if _is_real(x)]


def _is_boxed(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)
