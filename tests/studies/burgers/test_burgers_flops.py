"""What is counted by hand is what the model's matrix products and convolutions do, part by part and stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxablate.studies.burgers import flops
from jaxablate.studies.burgers.config import (
    BurgersModel,
    CoreConfig,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
)
from jaxablate.studies.burgers.model import Surrogate

CELLS, TOKENS = 24, 6
STACK = BurgersModel(
    encoder=EncoderConfig(tokens=TOKENS, dim=4, stem=2),
    decoder=DecoderConfig(hidden=8, layers=2, heads=2, ffn=12),
    core=CoreConfig(hidden=8, depth=3, depths=(2, 1, 1), heads=2, group=4),
)


def products(f: Callable[..., Any], *arguments: Any) -> float:
    """Twice the products of a program's matrix products and convolutions, as jax traced it."""

    def of(jaxpr: Jaxpr) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                sizes = [equation.invars[0].aval.shape[i] for i in contracted]
                total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(sizes)
            elif equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval.shape
                rows = kernel[0]  # of which one lies on the grid
                total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(kernel[:-1]) / rows
            for value in equation.params.values():
                inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                total += of(inner) if isinstance(inner, Jaxpr) else 0.0
        return total

    return of(jax.make_jaxpr(f)(*arguments).jaxpr)


def part(model: BurgersModel, method: str, *shapes: tuple[int, ...]) -> float:
    """What a method of the model does for one example, without what it does once for all of them."""
    surrogate, one = Surrogate(model, CELLS), jnp.ones(1)
    params = jax.eval_shape(lambda: surrogate.init(jax.random.key(0), jnp.zeros((1, CELLS)), one, one))

    def of(rows: int) -> float:
        inputs = [jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for shape in shapes]
        return products(lambda p, *x: surrogate.apply(p, *x, method=method), params, *inputs)

    return of(2) - of(1)


def changed(**core: Any) -> BurgersModel:
    return dataclasses.replace(STACK, core=dataclasses.replace(STACK.core, **core))


@pytest.mark.parametrize("kind", ["pdet_stack", "pdet_unet"])
@pytest.mark.parametrize("attention", ["standard", "channel_separated"])
def test_a_step_is_counted_as_it_runs(kind: str, attention: str) -> None:
    model = changed(kind=kind, attention=attention)
    assert flops.operator(model) == part(model, "step", (TOKENS, 4), (), ())


def test_width_and_what_it_is_told_count() -> None:
    same = dataclasses.replace(changed(hidden=4, group=2), conditioned_on="dt")
    assert flops.operator(same) == part(same, "step", (TOKENS, 4), (), ())
    assert flops.operator(same) < flops.operator(STACK)


@pytest.mark.parametrize("cells", ["patch", "pooled"])
def test_the_other_parts_are_counted_as_they_run(cells: Any) -> None:
    model = dataclasses.replace(STACK, encoder=dataclasses.replace(STACK.encoder, cells=cells))
    assert flops.encoder(model.encoder, CELLS) == part(model, "encode", (CELLS,))
    assert flops.decoder(model.decoder, CELLS, TOKENS, 4) == part(model, "decode", (TOKENS, 4))
    assert flops.corrector(model) == part(model, "correct", (TOKENS, 4), ())


def test_a_stage_counts_what_it_trains_three_times_and_what_is_frozen_once() -> None:
    def of(stage: str, model: BurgersModel = STACK) -> float:
        return flops.of_stage(model, CELLS, stage, distilled_at=3)

    encode, decode = flops.encoder(STACK.encoder, CELLS), flops.decoder(STACK.decoder, CELLS, TOKENS, 4)
    step, correct = flops.operator(STACK), flops.corrector(STACK)
    assert of("autoencoder") == 3 * (encode + decode)
    assert of("operator") == 3 * encode + 6 * step
    assert of("corrector") == 2 * encode + step + 3 * correct
    assert of("distill") == encode + step + 9 * correct
    near = dataclasses.replace(STACK, loss=LossConfig(rollout=0.0, rollout_steps=1))
    assert of("operator", near) == 2 * encode + 3 * step
    with pytest.raises(ValueError, match="no stage 'main'"):
        of("main")
