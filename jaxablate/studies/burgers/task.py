"""Burgers as a Task: an autoencoder, then an operator on its frozen tokens, then a corrector, then its distillation."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.nn.layout import traced_once
from jaxablate.rules import Rule
from jaxablate.studies.burgers import flops, metrics
from jaxablate.studies.burgers.conditioning import conditioned, faithful_reward, mass_reward
from jaxablate.studies.burgers.config import BurgersData, BurgersModel, StageConfig
from jaxablate.studies.burgers.data import Fields, open_fields
from jaxablate.studies.burgers.model import Surrogate
from jaxablate.studies.burgers.rules import rules
from jaxablate.task import Source, Stage, Task, Variables, resolve_kernels
from jaxablate_kernels import Resolved

SLOTS = {"core.attention_impl": "attention", "core.norm_impl": "norm"}
# Methods of the model, each with the part whose parameters it needs.
PARTS = {"encode": "encoder", "decode": "decoder", "step": "operator", "correct": "corrector"}
TAU = 0.5  # of the corrector where no candidates are drawn
DISTILLED_AT = 3  # values of tau for each sample of a batch


class BurgersTask(Task[BurgersModel, BurgersData]):
    """Fields one step apart; the response is the relative error of the predicted field, as PDEBench defines it."""

    Model = BurgersModel
    Data = BurgersData
    response = "val/nrmse"
    beside = {f"val/{name}": f"val/{still}" for name, still in metrics.BESIDE.items()}
    directions = {"train/loss": "min", **{f"val/{name}": "min" for name in metrics.LOWER_IS_BETTER}}

    def __init__(self, config: RunConfig[BurgersModel, BurgersData], platform: str):
        super().__init__(config, platform)
        resolved, self._kernels = resolve_kernels(config.model, SLOTS, platform)
        self.model = Surrogate(resolved, config.data.cells, dtype=jnp.dtype(config.training.compute_dtype))
        # Stages and predictions call the same parts again and again: Python goes through each of them once.
        self._methods = {
            name: traced_once(functools.partial(self.model.apply, method=name)) for name in PARTS
        }

    @classmethod
    def rules(cls, config: RunConfig[BurgersModel, BurgersData]) -> Iterator[Rule]:
        return rules(config)

    @property
    def kernels(self) -> Mapping[str, Resolved]:
        return self._kernels

    @property
    def tokens_per_example(self) -> int:
        return self.config.model.encoder.tokens

    @property
    def flops_per_example(self) -> float:
        model, cells = self.config.model, self.config.data.cells
        stages = self.stages() if self.stage is None else (self.stage,)
        counted = [flops.of_stage(model, cells, stage.name, DISTILLED_AT) for stage in stages]
        return float(np.average(counted, weights=[stage.steps for stage in stages]))

    def stages(self) -> tuple[Stage, ...]:
        model, optim = self.config.model, self.config.optim

        def stage(name: str, own: StageConfig, *trainable: str) -> Stage:
            rates = {"learning_rate": own.learning_rate, "weight_decay": own.weight_decay}
            return Stage(name, own.steps, replace(optim, **rates, end_fraction=own.end_fraction), trainable)

        found = [Stage("operator", self.config.training.steps, optim, ("operator/*",))]
        if self._decodes:
            found.insert(0, stage("autoencoder", model.autoencoder, "encoder/*", "decoder/*"))
        for name in ("corrector", "distill"):
            if (own := getattr(model, name)).steps:
                found.append(stage(name, own, "corrector/*"))
        return tuple(found)

    @property
    def _decodes(self) -> bool:
        """Whether tokens can be brought back to fields."""
        return self.config.model.encoder.kind == "trained" and self.config.model.autoencoder.steps > 0

    @property
    def _steps(self) -> int:
        """Steps in time that the loss looks at."""
        loss = self.config.model.loss
        return loss.rollout_steps if loss.rollout else 1

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        fields = jax.ShapeDtypeStruct((1 + self._steps, self.config.data.cells), jnp.float32)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        return {"u": fields, "viscosity": number, "dt": number}

    def open(self, cache: Path) -> Fields:
        rows = self.config.training.eval_batch_size
        return open_fields(self.config.data, cache, steps=self._steps, eval_batch_size=rows)

    def init(self, rng: jax.Array) -> Variables:
        one = jnp.ones(1)
        made = self.model.init(rng, jnp.zeros((1, self.config.data.cells)), one, one)
        # What its weight follows; counted in the operator's stage.
        return {**made, "clock": {"steps": jnp.float32(0)}} if self._inverts else made

    @property
    def _inverts(self) -> bool:
        return self.config.model.loss.inverse > 0

    def advance(self, collections: Variables, sums: Any) -> Variables:
        del sums
        if not self._inverts or self.stage is None or self.stage.name != "operator":
            return collections
        return {**collections, "clock": {"steps": collections["clock"]["steps"] + 1}}

    # -------------------------------------------------------------------------------------- training

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        """The terms of the stage's loss, each of every sample: {name: (B,)}."""
        assert self.stage is not None, "a task with stages is asked inside of one"
        losses = {
            "autoencoder": self._reconstruct,
            "operator": self._operate,
            "corrector": self._correct,
            "distill": self._distill,
        }
        return losses[self.stage.name](variables, batch, rngs), {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        config = self.config.model.loss
        weights: dict[str, Any] = {"spectral": config.spectral, "rollout": config.rollout}
        if self._inverts:
            steps = variables["clock"]["steps"]
            weights["inverse"] = inverse_weight(
                steps, config.inverse, config.inverse_warmup, config.inverse_cap
            )
        terms = {name: jnp.mean(values) for name, values in features.items()}
        total: Any = sum((weights.get(name, 1.0) * term for name, term in terms.items()), jnp.float32(0))
        return total, terms

    def _apply(self, variables: Variables, method: str, *inputs: Any) -> Any:
        part = PARTS[method]
        return self._methods[method]({"params": {part: variables["params"][part]}}, *inputs)

    def _reconstruct(self, variables: Variables, batch: Batch, rngs: jax.Array) -> dict[str, jax.Array]:
        del rngs
        u = batch["u"][:, 0]
        back = self._apply(variables, "decode", self._apply(variables, "encode", u))
        return {"reconstruction": jnp.mean(jnp.square(back - u), axis=1)}

    def _operate(self, variables: Variables, batch: Batch, rngs: jax.Array) -> dict[str, jax.Array]:
        loss, u = self.config.model.loss, batch["u"]
        told = (batch["dt"], batch["viscosity"])
        z, target = self._apply(variables, "encode", u[:, 0]), self._apply(variables, "encode", u[:, 1])
        z = self._apply(variables, "step", z, *told, rngs)
        terms = {"forward": _mean_square(z - target)}
        if loss.inverse:
            terms["inverse"] = _mean_square(self._apply(variables, "decode", z) - u[:, 1])
        if loss.spectral:
            amplitudes = jnp.abs(jnp.fft.rfft(z, axis=-1)) - jnp.abs(jnp.fft.rfft(target, axis=-1))
            terms["spectral"] = _mean_square(amplitudes)
        if loss.rollout:
            for _ in range(1, self._steps):
                z = self._apply(variables, "step", z, *told, rngs)
            terms["rollout"] = _mean_square(z - self._apply(variables, "encode", u[:, self._steps]))
        return terms

    def _one_step(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What the frozen operator makes of the first frames, and what it should have: both encoded."""
        z, target = (self._apply(variables, "encode", batch["u"][:, i]) for i in (0, 1))
        z = self._apply(variables, "step", z, batch["dt"], batch["viscosity"])
        return lax.stop_gradient(z), lax.stop_gradient(target)

    def _correct(self, variables: Variables, batch: Batch, rngs: jax.Array) -> dict[str, jax.Array]:
        z, target = self._one_step(variables, batch)
        drift = self._apply(variables, "correct", z, _uniform(rngs, "tau"))
        energy = [jnp.square(jnp.abs(jnp.fft.rfft(x, axis=1))) for x in (z + drift, target)]
        off = jnp.abs(energy[0] - energy[1]).sum((1, 2)) / (energy[1].sum((1, 2)) + 1e-8)
        return {"drift": _mean_square(drift - (target - z)), "spectral": off}

    def _distill(self, variables: Variables, batch: Batch, rngs: jax.Array) -> dict[str, jax.Array]:
        z, _ = self._one_step(variables, batch)
        drifts = jnp.stack(
            [self._apply(variables, "correct", z, _uniform(rngs, f"tau_{i}")) for i in range(DISTILLED_AT)]
        )
        to = jnp.zeros_like(drifts[0])
        if self.config.model.distill_to == "its_mean":
            to = lax.stop_gradient(drifts.mean(0))
        return {"drift": jnp.mean(jnp.square(drifts - to[None]), axis=(0, 2, 3))}

    # ------------------------------------------------------------------------------------ evaluation

    def predict(self, variables: Variables, batch: Batch) -> dict[str, Any]:
        """Fields and tokens of one step by all parts that there are in this stage, and a roll-out of the operator."""
        assert self.stage is not None, "a task with stages is asked inside of one"
        u, told = batch["u"], (batch["dt"], batch["viscosity"])
        before, after = (self._apply(variables, "encode", u[:, i]) for i in (0, 1))
        found: dict[str, Any] = {}
        if self._decodes:
            found["reconstruction"] = self._apply(variables, "decode", after)
        if self.stage.name == "autoencoder":
            return found
        z = self._apply(variables, "step", before, *told)
        tokens = {"before": before, "after": after, "operator": z}
        if self.stage.name in ("corrector", "distill"):
            tau = jnp.full(len(u), TAU)
            tokens["corrected"] = z + self._apply(variables, "correct", z, tau)
            if self.config.model.conditioning.candidates:
                tokens["conditioned"] = self._conditioned(variables, before, told)
        if self._decodes:
            for name in ("operator", "corrected", "conditioned"):
                if name in tokens:
                    found[name] = self._apply(variables, "decode", tokens[name])
            found["rollout"] = self._rollout(variables, before, told, u.shape[1] - 1)
        return {**found, "latent": tokens}

    def keep(self, source: Source, outputs: Sequence[Any]) -> Mapping[str, np.ndarray]:
        assert isinstance(source, Fields), "what `open` gives"
        return metrics.kept(outputs, source.evaluation, source.mean, source.std)

    def _rollout(self, variables: Variables, z: jax.Array, told: Any, steps: int) -> jax.Array:
        def advance(z: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            z = self._apply(variables, "step", z, *told)
            return z, self._apply(variables, "decode", z)

        _, fields = lax.scan(advance, z, length=steps)  # one step to compile, however far it goes
        return jnp.moveaxis(fields, 0, 1)

    def _conditioned(self, variables: Variables, z: jax.Array, told: Any) -> jax.Array:
        """The candidate of each sample that its reward likes best; the draws are the same at every evaluation."""
        config = self.config.model.conditioning
        reward = mass_reward if config.reward == "mass" else faithful_reward
        keys = jax.random.split(jax.random.key(0), len(z))
        best, _ = conditioned(
            z,
            lambda z: self._apply(variables, "step", z, *told),
            lambda z, tau: self._apply(variables, "correct", z, tau),
            lambda before, after: reward(
                self._apply(variables, "decode", before),
                self._apply(variables, "decode", after),
                config.weights,
            ),
            config,
            keys,
        )
        return best


def inverse_weight(at: Any, weight: float, warmup: int, cap: float) -> jax.Array:
    """0 before `warmup`, then rising to `weight` in as many steps, never above `cap`."""
    ramp = jnp.clip((at - warmup) / max(warmup, 1), 0, 1) if warmup else 1.0
    return jnp.minimum(weight * ramp, cap)


def _mean_square(x: jax.Array) -> jax.Array:
    """Of each sample: (B, …) -> (B,)."""
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _uniform(keys: jax.Array, what: str) -> jax.Array:
    """A number in [0, 1) for each sample, of its key and of what it is for: (B,)."""
    salt = np.uint32(zlib.crc32(what.encode()))
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, salt)))(keys)
