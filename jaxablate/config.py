"""The one border between `ml_collections` and the program.

A config file returns a `ConfigDict`; `load` turns it, with the overrides of the command line, into a
`Cohort` of frozen `RunConfig`s. Past this module nothing is a dict and nothing has a default that the
resolved config does not show. Imports no jax.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from jaxablate import userfile
from jaxablate.errors import UserError, suggestion
from jaxablate.rules import Rule, at_least, divides, enforce
from jaxablate.structure import convert, from_mapping

Direction = Literal["min", "max"]  # which way a metric is better
ModelT = TypeVar("ModelT")
DataT = TypeVar("DataT")

# Labels and host matters: they do not bear on what is computed, so they stay out of a run's identity.
NOT_IDENTITY = ("study", "arm", "scale", "host")
# What the members of a cohort may differ in: numbers that the compiled program takes as arguments.
MEMBER_FIELDS = ("seed", "optim.learning_rate", "optim.weight_decay")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping. `learning_rate` is the peak; `end_fraction` of it is left at the last step."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    decay: Literal["matrices", "all"] = "matrices"  # matrices: parameters of two or more axes
    # Before or after the update, p - lr (u + wd p) or (p - lr u) (1 - lr wd); or in the gradient that Adam is given,
    # g + wd p: "coupled", the weight_decay of torch's Adam.
    decay_at: Literal["before", "after", "gradient"] = "before"
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    clip_norm: float = 0.5  # global norm; 0 clips nothing
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    # Where in the schedule the first update is: 1, so that the last one has what is left of the rate; or 0, as in the
    # transformers library, where the first one has no rate when there is a warm-up.
    first_update: Literal[0, 1] = 1
    end_fraction: float = 0.01
    ema_decay: float = 0.0  # of an average of the parameters that evaluation uses; 0 keeps none
    # Times the rate, after more than `plateau_patience` evaluations without a clearly better response; see `plateau`.
    plateau_factor: float = 1.0  # 1: never
    plateau_patience: int = 10

    def rules(self) -> Iterator[Rule]:
        """What must hold."""
        for name in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps", "plateau_patience"):
            yield at_least(0, f"optim.{name}", getattr(self, name))
        for name in ("b1", "b2", "ema_decay"):
            value = getattr(self, name)
            yield Rule(f"optim.{name}", value, 0 <= value < 1, "must be in [0, 1)")
        yield Rule("optim.eps", self.eps, self.eps > 0, "must be more than 0")
        fraction = self.end_fraction
        yield Rule("optim.end_fraction", fraction, 0 <= fraction <= 1, "must be in [0, 1]")
        factor = self.plateau_factor
        yield Rule("optim.plateau_factor", factor, 0 < factor <= 1, "must be in (0, 1]; 1 for none")

    def __post_init__(self) -> None:
        enforce(self.rules())


@dataclass(frozen=True)
class TrainingConfig:
    """How long and in what portions. `batch_size` is the effective one: micro-batch x accumulation x shards."""

    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters stay float32
    remat: Literal["none", "block"] = "none"
    eval_every: int = 100
    eval_batch_size: int = 16
    # Of the training examples: anew each epoch, as they lie, or drawn with replacement.
    order: Literal["shuffle", "file", "random"] = "shuffle"
    early_stop: int = 0  # evaluations without a better response after which a member stops; 0: never
    restore: Literal["last", "best"] = "last"  # what a stage ends with: its last parameters, or its best

    def rules(self) -> Iterator[Rule]:
        """What must hold."""
        for name in ("steps", "batch_size", "accumulation", "eval_every", "eval_batch_size"):
            yield at_least(1, f"training.{name}", getattr(self, name))
        yield at_least(0, "training.early_stop", self.early_stop)
        if self.early_stop:
            least = self.early_stop * self.eval_every
            met = least < self.steps
            detail = f"can stop a run from step {least} on, with training.eval_every={self.eval_every}"
            must = f"{detail}, and training.steps={self.steps}: it never does; lower one of the two"
            yield Rule("training.early_stop", self.early_stop, met, detail if met else must, "advice")
        yield divides("training.accumulation", self.accumulation, "training.batch_size", self.batch_size)

    def __post_init__(self) -> None:
        enforce(self.rules())


# Fields that came after runs were on record. At its default such a field is left out of what is recorded, and of the
# identity with it, so that those runs stay what they are.
LATER: Mapping[str, Mapping[str, Any]] = {
    "optim": {
        "first_update": OptimConfig.first_update,
        "plateau_factor": OptimConfig.plateau_factor,
        "plateau_patience": OptimConfig.plateau_patience,
    },
    "training": {"early_stop": TrainingConfig.early_stop, "restore": TrainingConfig.restore},
    "host": {"until": ""},
}


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that came later and are at their defaults."""
    kept = {
        section: {k: v for k, v in values[section].items() if k not in later or v != later[k]}
        for section, later in LATER.items()
    }
    return {**values, **kept}


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded, with the fields that came later."""
    there = {name: later for name, later in LATER.items() if isinstance(values.get(name), Mapping)}
    return {**values, **{name: {**later, **values[name]} for name, later in there.items()}}


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; 0 lets the program choose (members first, then data)."""

    member: int = 0
    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def rules(self) -> Iterator[Rule]:
        """What must hold."""
        for axis in dataclasses.fields(self):
            yield at_least(0, f"host.mesh.{axis.name}", getattr(self, axis.name))

    def __post_init__(self) -> None:
        enforce(self.rules())


@dataclass(frozen=True)
class HostConfig:
    """Where and how a run is carried out; no part of its identity."""

    workdir: str = "runs"
    cache: str = ""  # data sets and compiled programs; empty: $JAXABLATE_CACHE or ~/.cache/jaxablate
    workers: int = 0  # processes that read batches; 0 reads in threads of the training process
    log_every: int = 10
    checkpoint_every: int = 100
    keep_last: int = 3
    split: int = 1  # times more micro-batches than training.accumulation, after running out of memory
    until: str = ""  # the stage at whose end to stop, to be continued without it; empty: the last one
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def rules(self) -> Iterator[Rule]:
        """What must hold."""
        for name in ("log_every", "checkpoint_every", "keep_last", "split"):
            yield at_least(1, f"host.{name}", getattr(self, name))
        yield at_least(0, "host.workers", self.workers)

    def __post_init__(self) -> None:
        enforce(self.rules())


@dataclass(frozen=True)
class RunConfig(Generic[ModelT, DataT]):
    """Everything that one run computes from. `model` and `data` are of the types its task names."""

    study: str
    arm: str
    scale: str
    task: str  # import path "package.module:Class" of the Task
    seed: int
    model: ModelT
    data: DataT
    optim: OptimConfig
    training: TrainingConfig
    host: HostConfig

    def rules(self) -> Iterator[Rule]:
        """What must hold besides the rules of the sections."""
        yield Rule("seeds", self.seed, 0 <= self.seed < 2**31, "must be in [0, 2**31)")
        if self.optim.plateau_factor < 1:
            least = (self.optim.plateau_patience + 1) * self.training.eval_every
            met = least < self.training.steps
            detail = (
                f"can cut the rate from step {least} on, with training.eval_every={self.training.eval_every}"
            )
            must = (
                f"{detail}, and training.steps={self.training.steps}: it never does; lower one of the three"
            )
            patience = self.optim.plateau_patience
            yield Rule("optim.plateau_patience", patience, met, detail if met else must, "advice")
        for name in ("study", "arm"):  # they name folders
            value = getattr(self, name)
            names_a_folder = re.fullmatch(r"\w[\w.-]*", value) is not None
            yield Rule(name, value, names_a_folder, "must be letters, digits, '_', '-', '.'")
        yield Rule(
            "host.split",
            self.host.split,
            self.training.batch_size % self.accumulation == 0,
            f"must be such that {self.accumulation} micro-batches divide "
            f"training.batch_size={self.training.batch_size}",
        )

    def __post_init__(self) -> None:
        enforce(self.rules())

    @property
    def accumulation(self) -> int:
        """Micro-batches of one update, here; the effective batch does not depend on it."""
        return self.training.accumulation * self.host.split

    @property
    def fingerprint(self) -> str:
        """Identity of the run: 12 hex digits of the SHA-256 of all that bears on what it computes."""
        identity = {k: v for k, v in recorded(dataclasses.asdict(self)).items() if k not in NOT_IDENTITY}
        return hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict in JSON's types, as `config.json` keeps it: see `LATER` for what may not be there."""
        return json.loads(canonical(recorded(dataclasses.asdict(self))))

    def complete(self) -> dict[str, Any]:
        """The same with every field."""
        return json.loads(canonical(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Cohort:
    """Runs of one arm that share one compiled program and differ only in `MEMBER_FIELDS`."""

    runs: tuple[RunConfig[Any, Any], ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("seeds=(): a cohort needs at least one run; give --config.seeds=0")
        seen = set()
        for run in self.runs:
            extra = sorted(set(diff(self.runs[0], run)) - set(MEMBER_FIELDS))
            if extra:
                raise UserError(f"{extra[0]} differs inside a cohort; only {', '.join(MEMBER_FIELDS)} may")
            if run.fingerprint in seen:
                raise UserError(f"seeds: {run.seed} is given twice; each member must be a run of its own")
            seen.add(run.fingerprint)

    @property
    def base(self) -> RunConfig[Any, Any]:
        """The first member's config, for all that the members share."""
        return self.runs[0]


# ---------------------------------------------------------------------------- declaring a config


def new_config(*, study: str, task: str, model: Any, data: Any) -> ConfigDict:
    """A complete, unlocked ConfigDict from the dataclasses' defaults, for `get_config` to change."""
    return ConfigDict(
        {
            "study": study,
            "arm": "",
            "scale": "",
            "task": task,
            "seeds": (0,),
            "model": dataclasses.asdict(model),
            "data": dataclasses.asdict(data),
            "optim": dataclasses.asdict(OptimConfig()),
            "training": dataclasses.asdict(TrainingConfig()),
            "host": dataclasses.asdict(HostConfig()),
        }
    )


def quotient(value: FieldReference, by: int | FieldReference) -> FieldReference:
    """ceil(value / by) in the operations that a reference has, so that the result follows an override of either."""
    return (value + by - 1) // by


def cache_dir(host: HostConfig) -> Path:
    """Where prepared data and compiled programs are kept: host.cache, $JAXABLATE_CACHE or ~/.cache/jaxablate."""
    return Path(host.cache or os.environ.get("JAXABLATE_CACHE") or "~/.cache/jaxablate").expanduser()


def parse_arg(arg: str, **choices: Collection[str]) -> dict[str, str]:
    """Reads `"flash_rms,scale=paper"`: comma-separated `key=value`, the first key's name may be left out.

    Args:
      arg: what follows the colon in `--config=file.py:arg`; empty takes every default.
      **choices: per key the valid values, the default first.

    Raises:
      UserError: unknown key or value (with the nearest valid one), or a key given twice.
    """
    keys = list(choices)
    chosen: dict[str, str] = {}
    for position, part in enumerate(part.strip() for part in arg.split(",") if part.strip()):
        key, equals, value = part.partition("=")
        if not equals:
            if position:
                raise UserError(f"config argument '{part}': write it as key=value; keys: {', '.join(keys)}")
            key, value = keys[0], part
        if key not in choices:
            raise UserError(f"config argument '{part}': unknown key '{key}'; {suggestion(key, keys)}")
        if value not in choices[key]:
            raise UserError(
                f"config argument {key}='{value}': unknown {key}; {suggestion(value, choices[key])}"
            )
        if key in chosen:
            raise UserError(f"config argument '{part}': {key} is given twice (also '{chosen[key]}')")
        chosen[key] = value
    return {key: chosen.get(key, next(iter(values))) for key, values in choices.items()}


def set_path(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the dotted `path`, which must exist and keep its type.

    Raises:
      UserError: unknown key, with the nearest valid one, or another type.
    """
    *sections, last = path.split(".")
    section: Any = config
    for depth, key in enumerate([*sections, last]):
        prefix = ".".join(sections[:depth])
        if not isinstance(section, ConfigDict):
            raise UserError(f"config.{path}: '{prefix}' is a value, not a section; remove '.{key}'")
        if key not in section:
            valid = [f"{prefix}.{k}".lstrip(".") for k in section]
            raise UserError(
                f"config.{path}: no such field; {suggestion(f'{prefix}.{key}'.lstrip('.'), valid)}"
            )
        if depth < len(sections):
            section = section[key]
    old = section[last]
    if isinstance(old, ConfigDict):
        raise UserError(f"config.{path}: is a section; set one of {', '.join(map(str, old))}")
    try:
        section[last] = value
    except TypeError:
        raise UserError(f"config.{path}={value!r}: must be {type(old).__name__}, as {old!r} is") from None


def named_arm(file: str, study_file: str, arm: str) -> Callable[[str], ConfigDict]:
    """`get_config` of a file that is one named arm of the study file beside it."""

    def get_config(arg: str = "") -> ConfigDict:
        return load_config_dict(f"{Path(file).with_name(study_file)}:arm={arm},{arg}".rstrip(","))

    return get_config


def frozen_config(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of a run that was frozen as JSON, on the default host, for a `get_config` to return.

    Raises:
      UserError: there is no such file, or it holds no config.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=_tuples)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}; restore the file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no config; restore the file")
    return ConfigDict({**_completed(values), "host": dataclasses.asdict(HostConfig())})


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}


# ------------------------------------------------------------------------------- loading a config


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Cohort:
    """The cohort that `--config=spec` and `--config.path=text` overrides describe: one run per seed.

    Raises:
      UserError: anything that is wrong with the file, its argument or an override.
    """
    config = load_config_dict(spec)
    override(config, overrides)
    return resolve(config)


def override(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets each (dotted path, text) in `config`; the text is read by the type that the field has."""
    for path, text in overrides:
        set_path(config, path, _parse_value(config, path, text))


def read_overrides(
    args: Sequence[str], valid: Sequence[str] = ("--config", "--print-config")
) -> list[tuple[str, str]]:
    """`--config.a.b=v` (or `--config.a.b v`) -> ("a.b", "v"); anything else is a UserError.

    `valid` are the command's own flags, for the suggestion.
    """
    overrides, waiting = [], list(args)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if not flag.startswith("--config."):
            flags = [*valid, "--config.PATH=VALUE"]
            raise UserError(f"{flag}: unknown argument; {suggestion(flag, flags)}")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{flag}: needs a value; write {flag}=VALUE")
            value = waiting.pop(0)
        overrides.append((flag.removeprefix("--config."), value))
    return overrides


def load_config_dict(spec: str) -> ConfigDict:
    """Runs `get_config(arg)` of `file.py:arg`. A config file is code: load only your own."""
    return userfile.call(spec, "get_config", ConfigDict, "the ConfigDict of new_config()")


def resolve(config: ConfigDict) -> Cohort:
    """ConfigDict -> frozen dataclasses, one run per entry of `seeds`."""
    values = config.to_dict()
    if "task" not in values or not isinstance(values["task"], str):
        raise UserError("config.task: missing; give the import path of a Task as 'package.module:Class'")
    task = import_task(values["task"])
    seeds = convert(tuple[int, ...], values.pop("seeds", ()), "config.seeds")
    return Cohort(tuple(_run(values | {"seed": seed}, task) for seed in seeds))


def from_dict(values: Mapping[str, Any], host: HostConfig) -> RunConfig[Any, Any]:
    """The config that `to_dict` gave, without its host, on this host."""
    kept = {key: value for key, value in values.items() if key != "host"}
    return _run(_completed(kept) | {"host": dataclasses.asdict(host)}, import_task(values["task"]))


def _run(values: Mapping[str, Any], task: Any) -> RunConfig[Any, Any]:
    return from_mapping(RunConfig, values, "config.", {"model": task.Model, "data": task.Data})


def import_task(name: str) -> Any:
    """The class that `package.module:Class` names.

    Raises:
      UserError: it cannot be imported, or lacks the `Model` and `Data` config types of a Task.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise UserError(f"config.task='{name}': write it as 'package.module:Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the task's own module lacks a dependency: that traceback is worth seeing
        raise UserError(f"config.task='{name}': no module '{error.name}'; is it on PYTHONPATH?") from None
    task = getattr(module, class_name, None)
    if task is None:
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise UserError(
            f"config.task='{name}': {module_name} has no '{class_name}'; {suggestion(class_name, classes)}"
        )
    for section in ("Model", "Data"):
        if not dataclasses.is_dataclass(getattr(task, section, None)):
            raise UserError(f"config.task='{name}': {class_name}.{section} must name a frozen dataclass")
    return task


# --------------------------------------------------------------------------- comparing configs


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def diff(a: RunConfig[Any, Any], b: RunConfig[Any, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two configs differ, with both values, in order of the path."""
    left, right = flatten(a.complete()), flatten(b.complete())
    paths = sorted(left.keys() | right.keys())
    return {p: (left.get(p), right.get(p)) for p in paths if left.get(p) != right.get(p)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted path to leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return flat


def to_json(cohort: Cohort) -> str:
    """The resolved configs of a cohort, each with its fingerprint, as readable JSON."""
    return json.dumps([{"fingerprint": run.fingerprint, **run.complete()} for run in cohort.runs], indent=2)


# ------------------------------------------------------------------------------------- internals


def _parse_value(config: ConfigDict, path: str, text: str) -> Any:
    """The value that `text` means for the field at `path`, read by the type that the field has."""
    here: Any = config
    for key in path.split("."):
        if not isinstance(here, ConfigDict) or key not in here:
            return text  # set_path has the words for this
        here = here[key]
    if isinstance(here, str | ConfigDict):
        return text
    if isinstance(here, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"config.{path}={text!r}: must be {type(here).__name__}, as {here!r} is") from None
    if isinstance(here, tuple) and not isinstance(value, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    return value
