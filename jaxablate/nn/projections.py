"""Projections of a model with low-rank adapters beside them, and with their kernels stored quantised.

The model's code knows nothing of it: Flax hands us each call of a `Dense` or `DenseGeneral` while the model is
initialised and applied inside

    with projections(adapters=Lora(targets=("*/attention/q", "*/attention/v"))):
        variables = model.init(key, x)

Both must be traced inside, so the `with` stands within what is jitted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax import lax
from jaxtyping import Array

from jaxablate.errors import UserError, suggestion
from jaxablate.nn import lora, quantized
from jaxablate.nn.linear import linear
from jaxablate.nn.lora import Lora

_inside: ContextVar[bool] = ContextVar("inside", default=False)


@dataclass(frozen=True)
class Quantization:
    """Which kernels are stored quantised.

    Attributes:
      targets: glob patterns over the paths of projections, such as `layers/*`.

    Raises:
      UserError: there is no pattern.
    """

    kind: quantized.Kind
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError("quantization: targets is empty; name projections, such as 'layers/*'")

    def chooses(self, path: str) -> bool:
        """Whether the kernel of the projection at `path` is stored."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.targets)


@contextlib.contextmanager
def projections(
    *, adapters: Lora | None = None, base: Quantization | None = None, keys: Array | None = None
) -> Iterator[None]:
    """Reads and adds to the projections of every model that is initialised or applied inside.

    A stored kernel is in the collection `quantized` instead of `params`; initialised, it is what the model's own
    initialiser gives, rounded. Parameters that a model has without all this start from the same numbers.

    Args:
      adapters: low-rank adapters, or none.
      base: the kernels that are stored, or none.
      keys: a key for each example, for the adapters' dropout; None in evaluation. With them the model is applied
        with `rngs={"dropout": key}`: a key that may be constant, from which Flax derives where a projection stands.

    Raises:
      UserError: on leaving, if a model was initialised and a pattern matched none of its projections.
    """
    if _inside.get():
        raise RuntimeError("projections: one inside the other would hide it; name adapters and base in one")
    changed = _Changed(adapters, base, keys)
    token = _inside.set(True)
    try:
        with nn.intercept_methods(changed):
            yield
    finally:
        _inside.reset(token)
    changed.check()


@dataclass(frozen=True)
class _Changed:
    """What `projections` does to each call."""

    adapters: Lora | None
    base: Quantization | None
    keys: Array | None
    initialised: set[str] = field(default_factory=set)  # paths of all projections that were

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        module = context.module
        projects = isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__"
        if not projects or module.name in (lora.A, lora.B):
            return call(*args, **kwargs)
        path = "/".join(module.path)
        if module.is_initializing():
            self.initialised.add(path)
        stored = self.base if self.base is not None and self.base.chooses(path) else None
        adapters = self.adapters if self.adapters is not None and self.adapters.chooses(path) else None
        if stored is None and adapters is None:
            return call(*args, **kwargs)
        x = args[0] if args else kwargs["inputs"]
        place = _Place.of(module, path, x)
        y = call(x) if stored is None else place.stored_product(x, stored.kind)
        return y if adapters is None else y + place.low_rank(x, adapters, self.keys, y.dtype)

    def check(self) -> None:
        """Whether every pattern met a projection, if a model was initialised."""
        asked = {"lora": self.adapters, "quantization": self.base}
        for name, chosen in asked.items():
            for pattern in chosen.targets if chosen is not None and self.initialised else ():
                if not any(fnmatch.fnmatchcase(path, pattern) for path in self.initialised):
                    raise UserError(
                        f"{name}: targets has '{pattern}', which matches no projection of the model; "
                        f"{suggestion(pattern, self.initialised)}"
                    )


@dataclass(frozen=True)
class _Place:
    """One projection, and the axes of its kernel."""

    module: Any  # nn.Dense | nn.DenseGeneral
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, module: Any, path: str, x: Array) -> _Place:
        axis = getattr(module, "axis", -1)
        axes = [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
        if getattr(module, "batch_dims", ()) or axes != list(range(x.ndim - len(axes), x.ndim)):
            raise ValueError(
                f"{path}: only a projection of the last axes, in order, can be adapted or stored"
            )
        features = module.features
        outputs = (features,) if isinstance(features, int) else tuple(features)
        return cls(module, path, x.shape[-len(axes) :], outputs)

    @property
    def names(self) -> tuple[str | None, ...]:
        """Logical names of the kernel's axes."""
        init, sizes = self.module.kernel_init, (math.prod(self.inputs), math.prod(self.outputs))
        kernel = jax.eval_shape(lambda: init(jax.random.key(0), sizes, self.module.param_dtype))
        if isinstance(kernel, nn.Partitioned):
            return kernel.names
        return (None,) * (len(self.inputs) + len(self.outputs))

    def stored_product(self, x: Array, kind: quantized.Kind) -> Array:
        """What the module gives, from a kernel in the collection `quantized`."""
        module = self.module

        def init() -> quantized.Stored:
            sizes = (math.prod(self.inputs), math.prod(self.outputs))
            kernel = nn.unbox(module.kernel_init(module.make_rng("params"), sizes, module.param_dtype))
            stored = quantized.quantize(kernel.T, kind)
            # Blocks follow one another as the rows of outputs do, so they lie where those belong.
            names = (self.names[len(self.inputs)], None)
            return replace(stored, codes=nn.LogicallyPartitioned(stored.codes, names))

        stored = module.variable(quantized.COLLECTION, "kernel", init).value
        dtype = module.dtype or x.dtype
        y = quantized.product(x.astype(dtype), stored, self.inputs, self.outputs)
        if module.use_bias:
            bias = module.param("bias", self._bias, self.outputs, module.param_dtype)
            y = y + lax.expand_dims(bias.astype(dtype), range(y.ndim - bias.ndim))
        return y

    def _bias(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        """As Flax draws it: flat, and then with its axes."""
        flat = self.module.bias_init(key, (math.prod(shape),), dtype)
        return nn.meta.replace_boxed(flat, nn.unbox(flat).reshape(shape))

    def low_rank(self, x: Array, spec: Lora, keys: Array | None, dtype: Any) -> Array:
        """What the adapter adds: two projections below the module's own, whose random numbers they leave alone."""
        n_in, names = len(self.inputs), self.names
        if keys is not None and spec.dropout:
            x = self._dropped(x, spec.dropout, keys)
        down = linear(spec.rank, (*names[:n_in], None), name=lora.A, dtype=dtype, contract=n_in)
        up = linear(
            self.outputs,
            (None, *names[n_in:]),
            name=lora.B,
            dtype=dtype,
            kernel_init=nn.initializers.zeros,
        )
        return spec.scale * up(down(x))

    def _dropped(self, x: Array, rate: float, keys: Array) -> Array:
        """`x` with elements zeroed: a function of the example's key, and of where and in which layer we are."""
        if len(keys) != len(x):
            raise ValueError(
                f"{self.path}: {len(keys)} keys, but {len(x)} rows; dropout needs a row an example"
            )
        place = jax.random.bits(self.module.make_rng("dropout"))

        def kept(key: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape[1:])

        return jnp.where(jax.vmap(kept)(keys), x / (1 - rate), jnp.zeros((), x.dtype))
