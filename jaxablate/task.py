"""What a study implements. The loop, checkpoints, cohorts and sharding are the program's."""

from __future__ import annotations

import abc
import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, runtime_checkable

import jax
import numpy as np

from jaxablate.config import DataT, Direction, ModelT, OptimConfig, RunConfig
from jaxablate.data import Batch, Items
from jaxablate.errors import UserError
from jaxablate.rules import Broken, Rule, enforce
from jaxablate.trees import count
from jaxablate_kernels import Resolved, dispatch
from jaxablate_kernels.errors import PackageMissing

if TYPE_CHECKING:
    from jaxablate.text.tokenizer import Vocabulary

Variables = Mapping[str, Any]  # Flax collections; "params" is trained, the others are state


@runtime_checkable  # so that tests can check what functions are given
class Source(Protocol):
    """The opened data of a task."""

    @property
    def train(self) -> Items:
        """The training examples."""
        ...

    @property
    def evaluation(self) -> Sequence[Batch]:
        """The evaluation batches: the same, in the same order, for every arm and member."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the data's content: a run is never continued on other data."""
        ...

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Metrics of one member from its `predict` outputs, one per evaluation batch, on the host."""
        ...

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """Predictors that know nothing, by name: what `predict` would give for each evaluation batch.

        Such as a constant, an empty answer, a copy of the input. `check` scores them, and they must not do
        well. `outputs` are a real model's, for their shapes.
        """
        ...


@dataclass(frozen=True)
class Stage:
    """A named part of a run: how long, with which optimiser, and which parameters it trains.

    Its rates are for the task's own config; those of a member with other rates are of a task of that member's config.
    `trainable` are glob patterns over parameter paths such as `image/*/kernel`; what none of them matches
    is frozen: no update, no decay, no optimiser state. `optimizer` is a new one, or `kept`: the stage goes on with the
    moments of the one before as its last step left them, which must be of the same parameters. `eval_every` counts the
    stage's own steps between evaluations; None: those of the run, by `training.eval_every`.
    """

    name: str
    steps: int
    optim: OptimConfig
    trainable: tuple[str, ...] = ("*",)
    optimizer: Literal["fresh", "kept"] = "fresh"
    eval_every: int | None = None

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained in this stage."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.trainable)

    def evaluates(self, done: int, before: int, every: int) -> bool:
        """Whether there is an evaluation after its first `done` steps, which the last of them always has.

        Args:
          before: steps of the run before the stage.
          every: `training.eval_every`.
        """
        regular = (before + done) % every if self.eval_every is None else done % self.eval_every
        return regular == 0 or done == self.steps


def _no_trivial(outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
    del outputs
    return {}


@dataclass(frozen=True)
class Closing:
    """What a member is measured by once, when its training has ended: what is too dear, or too late, to ask earlier.

    Such as scores on a test set that no choice may depend on, or of texts that take long to write.

    Attributes:
      batches: `Task.conclude` gets each of them, in this order, from every arm and member.
      score: metrics of one member from its outputs, one per batch, on the host; their names are not among those of
        `Source.score`.
      trivial: as `Source.trivial`: what predictors that know nothing would give for these batches.
    """

    batches: Sequence[Batch]
    score: Callable[[Sequence[Any]], dict[str, float]]
    trivial: Callable[[Sequence[Any]], Mapping[str, Sequence[Any]]] = field(default=_no_trivial)


@dataclass(frozen=True)
class Speedup:
    """Two ways to do the same work, of which a study's document says that one is faster; `bench speedups` looks.

    Attributes:
      claim: the document's, in its words.
      original, ours: each does the whole work once; what they return is waited for.
      agreement: of their two results: how far they are the same, in a few words.
    """

    name: str
    claim: str
    original: Callable[[], Any]
    ours: Callable[[], Any]
    agreement: Callable[[Any, Any], str]


def resolve_kernels(
    model: ModelT, slots: Mapping[str, str], platform: str
) -> tuple[ModelT, dict[str, Resolved]]:
    """The model's config with the kernels that run on a platform instead of the names that were asked for.

    Args:
      model: a frozen dataclass.
      slots: dotted path below `config.model` -> operation whose implementation it names.
      platform: cpu, gpu or tpu.

    Returns:
      The config, and by full path (`model.image.attention.impl`) which kernel each name stands for.

    Raises:
      UserError: a name that the operation does not have, or that needs a package which is not installed.
    """
    resolved: dict[str, Resolved] = {}
    for path, op in slots.items():
        asked: Any = functools.reduce(getattr, path.split("."), model)
        try:
            kernel = dispatch.resolve(op, asked, platform)
            dispatch.load(op, kernel.name)
        except (ValueError, PackageMissing) as error:
            raise UserError(f"config.model.{path}='{asked}': {error}") from None
        resolved[f"model.{path}"] = kernel
        model = _replace_at(model, path.split("."), kernel.name)
    return model, resolved


def _replace_at(config: Any, path: Sequence[str], value: str) -> Any:
    name, *rest = path
    inner = _replace_at(getattr(config, name), rest, value) if rest else value
    return replace(config, **{name: inner})


class Task(abc.ABC, Generic[ModelT, DataT]):
    """One study's model, loss and data. A task is cheap to make: data is read by `open` alone.

    The loss is written in two parts so that it may look across the whole batch (contrastive losses,
    losses normalised over all tokens) and gradient accumulation still gives the gradient of the whole
    batch: `encode` sees a micro-batch, `loss` the features of all.
    """

    Model: ClassVar[type]  # frozen dataclass of `config.model`
    Data: ClassVar[type]  # frozen dataclass of `config.data`
    directions: ClassVar[Mapping[str, Direction]]  # which way a metric is better
    # Of what `predict` and `conclude` make outputs: of each row by itself, all of them with the rows as first axis, so
    # that a batch may be cut into `host.split` parts; or of the whole batch, which is never cut: a loss that compares
    # its rows, noise that goes by their places.
    evaluates: ClassVar[Literal["whole", "rows"]] = "whole"
    response: ClassVar[str]  # the metric by which the best checkpoint is kept
    # How well `init` is compiled for a CPU (see `xla.quick`): more than the least pays where it draws many millions of
    # numbers. One word for all arms, whatever their size: the last digit of what they start from may depend on it.
    init_effort: ClassVar[Literal["least", "little"]] = "least"
    # Metric -> the metric that says what a predictor which knows nothing scores there, to stand beside it.
    beside: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: RunConfig[ModelT, DataT], platform: str):
        """`platform` (cpu, gpu, tpu) decides which implementation carries an algorithm.

        Raises:
          UserError: a static rule of the study does not hold.
        """
        enforce(self.rules(config))
        self.config = config
        self.platform = platform
        self.stage: Stage | None = None

    def during(self, stage: Stage) -> Self:
        """The task in one of its stages, for those whose loss or predictions are not the same in all of them."""
        inside = copy.copy(self)
        inside.stage = stage
        return inside

    @classmethod
    def rules(cls, config: RunConfig[ModelT, DataT]) -> Iterable[Rule]:
        """What must hold of a config besides the rules of its sections; names are paths below `config`.

        `validate` lists all of it. No task is made of a config for which a static rule does not hold.
        """
        del config
        return ()

    @property
    def unsplittable(self) -> str:
        """The rule by which the micro-batches here cannot be halved, in words; empty if they can."""
        host = self.config.host
        try:
            halved = replace(self.config, host=replace(host, split=2 * host.split))
            enforce(self.rules(halved))
        except Broken as broken:
            return str(broken)
        return ""

    @property
    def kernels(self) -> Mapping[str, Resolved]:
        """Per slot the implementation asked for and the one that carries it on the platform."""
        return {}

    @property
    def tokens_per_example(self) -> int:
        """Tokens that the model sees of one training example of the largest size; 0 if the word has no meaning."""
        return 0

    @property
    def flops_per_example(self) -> float | None:
        """Floating-point operations of the model for one training example of the largest size, forward and backward.

        Of the definition, so the same for all implementations of it; None if nobody has counted. Of the stage that
        the task is in; outside of one, the mean over the steps of all.
        """
        return None

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the run, in order."""
        return (Stage("main", self.config.training.steps, self.config.optim),)

    @abc.abstractmethod
    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one training example, without the batch axis: what every item of the data has."""

    def fit(self, batch: Batch) -> Batch:
        """A cohort's training batch (members, examples, …), on the host, cut to the smallest size of few that holds it.

        What is cut off must be padding that bears on nothing: the run is that of uncut batches but for rounding. A
        step is compiled for every size when it first comes, and the summary counts the steps of each (`buckets`).
        Evaluation batches have whatever shapes they have.
        """
        return batch

    @abc.abstractmethod
    def open(self, cache: Path) -> Source:
        """Opens, and where needed prepares, the data. All problems with it are raised here as UserError."""

    def data_of_stage(self, source: Source) -> Source:
        """What the stage that the task is in trains on and is evaluated on; asked of it inside of each stage.

        A stage with a source of its own counts its batches from its own first step, so that in the order of the file
        it begins with the first item. A run's identity and its `closing` are of the whole source. Best scores over
        several such stages are not of the same data: each stage goes by its own.
        """
        return source

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Variables:
        """Initial variables; parameters carry logical axis names (`nn.with_logical_partitioning`)."""

    @property
    def abstract_base(self) -> Variables:
        """Flax collections that no stage trains and all members share, as shapes, by default none.

        Such as a frozen pretrained model beside which `init` makes the adapters alone. Every member gets them in its
        `variables`, beside what `init` made; they are no part of its state, so no optimiser, gradient or checkpoint
        has them, and the devices hold them once. Leaves may carry logical axis names as parameters do. It is asked
        often: cache it.
        """
        return {}

    @property
    def base_parameters(self) -> int:
        """How many parameters the base stands for; to be said by a task whose base packs several into a number."""
        return count(self.abstract_base)

    def base(self, cache: Path) -> Variables:
        """The arrays of `abstract_base`, of any bits: on the host, or on a device if they were made there.

        The engine takes their digest into the identity of a run, so that a run is never continued on other ones.
        All problems with them are raised here as UserError.
        """
        del cache
        return {}

    @functools.cached_property
    def abstract(self) -> Variables:
        """What `init` makes, as shapes; a large model takes seconds to trace, and every stage asks for it."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))  # also the key: the devices may be absent

    @abc.abstractmethod
    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        """Features (arrays with a leading example axis) and sums (added up over micro-batches).

        `rngs` has a key for each example, so that noise does not depend on how the batch is split.
        """

    @abc.abstractmethod
    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """The loss of a whole batch from its features, and further scalars to record."""

    def advance(self, collections: Variables, sums: Any) -> Variables:
        """The collections other than `params` after a step with these sums."""
        del sums
        return collections

    @abc.abstractmethod
    def predict(self, variables: Variables, batch: Batch) -> Any:
        """Outputs for one evaluation batch, or for part of its rows (see `evaluates`).

        Runs compiled, one member at a time in shape.
        """

    def closing(self, source: Source) -> Closing | None:
        """What each member is measured by once, when its training has ended; None for nothing.

        A member is measured when its last stage is over, or when it has stopped before, with the parameters that it
        leaves: its best ones where `training.restore` says so. The metrics are recorded as `val/<name>` at the step
        after its last one, beside the last evaluation where that is repeated there, and may be responses of a study.
        A run that diverged has none. One that is killed after its last checkpoint is measured when it goes on.
        """
        del source
        return None

    def conclude(self, variables: Variables, batch: Batch) -> Any:
        """Outputs for one batch of `closing`; runs compiled as `predict` does, which it is by default."""
        return self.predict(variables, batch)

    def speedups(self, cache: Path, scratch: Path) -> Iterable[Speedup]:
        """What the study's document says is faster, one thing at a time.

        `cache` is that of `open`; what lies in the folder `scratch` is removed after the last call.
        """
        del cache, scratch
        return ()

    def keep(self, source: Source, outputs: Sequence[Any]) -> Mapping[str, np.ndarray]:
        """What of one member's outputs is kept on disk, to be drawn in the report; few and small.

        They are those of `conclude` where the task has a `closing`, else the last ones of `predict`.
        """
        del source, outputs
        return {}


class TextTask(Task[ModelT, DataT]):
    """A task whose model continues text, so that it can be sampled from (see `decoding`).

    A cache is what the model remembers of the tokens that it has read: a pytree of arrays, rows first.
    """

    @property
    @abc.abstractmethod
    def context(self) -> int:
        """Tokens that a cache holds."""

    @abc.abstractmethod
    def vocabulary(self, source: Source) -> Vocabulary | None:
        """Between text and the model's ids; None if the data came without it."""

    @abc.abstractmethod
    def opening(self, source: Source, vocabulary: Vocabulary) -> Sequence[int]:
        """The ids that stand before a text of which nothing is given."""

    @abc.abstractmethod
    def fill(self, variables: Variables, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, Any]:
        """Reads tokens (rows, length), of which row i has last[i] + 1 and padding behind them.

        Gives the logits (rows, vocabulary) of the token after each row's last one, and a cache.
        """

    @abc.abstractmethod
    def extend(
        self, variables: Variables, cache: Any, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Reads one more token (rows,) at a position (rows,) below `context`; logits after it, and the cache."""
