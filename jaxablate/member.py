"""The functions of one member in one stage, uncompiled: its state at the start, a step, what follows a score."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxablate import optim
from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.plateau import Control, Judged, Policy
from jaxablate.stability import Stability
from jaxablate.task import Stage, Task, Variables
from jaxablate.trees import Axes, is_boxed, path_name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Member:
    """What the members of a cohort differ in; one entry per member."""

    seed: Any
    learning_rate: Any
    weight_decay: Any


StateT = TypeVar("StateT", "State", Control)


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


class MemberProgram:
    """What a member does in one stage; `first` updates were done before it.

    `base` is what the task's members share: an input of these functions, and of no member's state.
    """

    def __init__(self, task: Task[Any, Any], run: RunConfig[Any, Any], stage: Stage, first: int):
        check_stages(task)
        if both := task.abstract.keys() & task.abstract_base.keys():
            raise ValueError(
                f"{type(task).__name__}: {', '.join(sorted(both))} is made by init and in the base too"
            )
        self.task, self.stage, self.first = task.during(stage), stage, first
        self.end = first + stage.steps
        self.policy = Policy.of(task, stage, first)
        self._batch_size, self._parts = run.training.batch_size, run.accumulation
        self.trained = trained_in(stage, task)
        # An axis of stacked layers does not make a bias a matrix.
        ranks = jax.tree.map(
            lambda leaf: len([axis for axis in Axes.of(leaf).names if axis != "layers"]),
            task.abstract["params"],
            is_leaf=is_boxed,
        )
        self._mask = optim.decay_mask(stage.optim, ranks)

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
        self, state: State, member: Member, batch: Batch, n: jax.Array, base: Variables
    ) -> tuple[State, dict[str, jax.Array]]:
        """Update `n` (from 1) of one member; a step that is not finite leaves the state as it was, for good.

        So does every step after it stopped.
        """
        # Noise is a function of (seed, step) and, inside Flax, of the module path.
        rng = jax.random.fold_in(jax.random.key(member.seed), n)
        rngs = jax.random.split(rng, self._batch_size)
        loss, aux, sums, grads = self._gradient(state, batch, rngs, base)
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
        new = chosen(moves, new, state)
        new = replace(new, alive=ok, diverged_at=jnp.where(state.alive & ~ok, n, state.diverged_at))
        metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": rate}
        extra = {f"train/{k}": v for k, v in aux.items()}
        return new, {**metrics, **extra, **new.stability.metrics(), "diverged_at": new.diverged_at}

    def _trained_of(self, new: Any, old: Any) -> Any:
        """`new` parameters, or their average, of what the stage trains; the rest is `old`, and costs nothing."""
        if self.trained is True or not old:
            return new
        return jax.tree.map(lambda n, o, trained: n if trained else o, new, old, self.trained)

    def _gradient(
        self, state: State, batch: Batch, rngs: jax.Array, base: Variables
    ) -> tuple[jax.Array, Any, Any, Any]:
        """Loss, its extras, sums and the gradient of the whole batch, whatever the accumulation.

        With accumulation the features of all micro-batches are computed first, the loss and its gradient
        with respect to them next, and then each micro-batch again to carry that gradient to the
        parameters (gradient caching, Gao et al. 2021): exact also where the loss couples examples.
        """
        task, parts, others = self.task, self._parts, {**state.collections, **base}

        def encode(params: Any, micro: Batch, key: jax.Array) -> tuple[Any, Any]:
            return task.encode({"params": params, **others}, micro, key)

        def head(params: Any, features: Any) -> tuple[jax.Array, Any]:
            return task.loss({"params": params, **others}, features)

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

    def _member_judge(self, control: Control, alive: jax.Array, response: jax.Array, n: jax.Array) -> Judged:
        """What follows for a member whose control is this; nothing if it does not train."""
        assert self.policy is not None
        judged = self.policy.judge(control, response, n)
        trains = alive & (control.stopped_at < 0)
        return Judged(chosen(trains, judged.control, control), judged.better & trains, judged.ends & trains)

    def _member_predict(self, state: State, batch: Batch, base: Variables) -> Any:
        return self.task.predict(self._evaluated(state, base), batch)

    def _member_conclude(self, state: State, batch: Batch, base: Variables) -> Any:
        return self.task.conclude(self._evaluated(state, base), batch)

    def _evaluated(self, state: State, base: Variables) -> Variables:
        """What evaluation sees: the average of the parameters if one is kept."""
        params = state.ema if self.stage.optim.ema_decay else state.params
        return {"params": params, **state.collections, **base}


def keeping(state: State) -> State:
    """With the variables as they are for the best so far."""
    assert state.control is not None
    own = _variables(state.params, state.collections, state.ema)
    return replace(state, control=replace(state.control, kept=own))


def restored(state: State) -> State:
    """With the best variables so far."""
    assert state.control is not None
    return replace(state, **state.control.kept)


def chosen(new_one: jax.Array, new: StateT, old: StateT) -> StateT:
    """One of two states; what is the same in both stays the very same array."""
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(new_one, a, b), new, old)


def trained_in(stage: Stage, task: Task[Any, Any]) -> Any:
    """Which parameters a stage trains: True for all, or a tree of bools."""
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, _: stage.trains(path_name(path)), task.abstract["params"], is_leaf=is_boxed
    )
    return True if all(jax.tree.leaves(chosen)) else chosen


def check_stages(task: Task[Any, Any]) -> None:
    """Looks at the stages that go on with an optimiser.

    Raises:
      UserError: the one before has another, or trains other parameters.
    """

    def moments(stage: Stage) -> Any:
        optimizer = optim.transform(stage.optim, True, 0.0, 0.0, trained_in(stage, task))
        return jax.tree.structure(jax.eval_shape(optimizer.init, nn.unbox(task.abstract["params"])))

    stages = task.stages()
    if stages[0].optimizer == "kept":
        raise UserError(f"stage '{stages[0].name}': optimizer='kept' goes on with one before it; use 'fresh'")
    for before, stage in itertools.pairwise(stages):
        if stage.optimizer == "kept" and moments(before) != moments(stage):
            raise UserError(
                f"stage '{stage.name}': optimizer='kept' needs the parameters and the kind of optimiser of stage "
                f"'{before.name}'; train the same ones, or use optimizer='fresh'"
            )


def _variables(params: Any, collections: Any, ema: Any) -> dict[str, Any]:
    """What of a state evaluation depends on, by the state's own names."""
    return {"params": params, "collections": collections, "ema": ema}


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _real(features: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(features) if _is_real(x)]
