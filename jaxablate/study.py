"""What a study declares: factors, arms, seeds, learning rates, responses, hypotheses. Data only; no jax.

FACTORS = (switch("rms", "model", {"model.norm": "rmsnorm"}), …)
Study(name="mine", base=config, factors=FACTORS, arms=factorial(FACTORS), seeds=(0, 1, 2), …)
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxablate import userfile
from jaxablate.arms import NAME, Arm, Factor, factorial, one_factor_out, product, require, switch, zipped
from jaxablate.config import Direction, canonical, override, set_path
from jaxablate.errors import UserError, suggestion
from jaxablate.structure import from_mapping

# A study's file needs one import, so what it varies is here too.
__all__ = [
    "Arm", "Expectation", "Factor", "Hypothesis", "LearningRate", "Phase", "Response", "Run", "Study",
    "factorial", "load", "one_factor_out", "product", "switch", "zipped",
]  # fmt: skip

Phase = Literal["tuning", "confirm"]
BENCHMARKED = ("speedup", "memory")  # of an expectation: what is measured of the step, not of the runs
_NOT_AN_ARMS = ("study", "arm", "scale", "task", "seeds", "seed")


@dataclass(frozen=True)
class Response:
    """A metric, which way it is better, and the rule that reduces a run to one number.

    `final` is the last value, `best` the best one, `at` the one at `step`, `time_to` the first step and
    second at which it reaches `target`, which is a number, or with `fraction` that share of the way from
    `chance` to the baseline arm's mean best.
    """

    metric: str  # a key of metrics.jsonl, such as val/macro_auroc
    direction: Direction
    reduce: Literal["final", "best", "at", "time_to"] = "final"
    step: int = 0  # of `at`
    target: float | None = None  # of `time_to`
    fraction: float | None = None  # of `time_to`, instead of a target
    scale: Literal["raw", "log"] = "raw"  # log: ratios are what counts, as of losses and errors
    chance: float | None = None  # what a predictor that knows nothing scores
    name: str = ""  # default: from the metric and the rule

    def __post_init__(self) -> None:
        if not self.name:
            short = self.metric.removeprefix("val/").replace("/", "_")
            suffix = {"final": "", "best": "_best", "at": f"_at_{self.step}", "time_to": "_time"}[self.reduce]
            object.__setattr__(self, "name", short + suffix)
        require(
            NAME.fullmatch(self.name) is not None, f"response '{self.name}': letters, digits, '_', '-', '.'"
        )
        if self.reduce == "at":
            require(self.step > 0, f"response '{self.name}': reduce='at' needs step=N")
        if self.reduce == "time_to":
            require(
                (self.target is None) != (self.fraction is None),
                f"response '{self.name}': reduce='time_to' needs target=X or fraction=F, one of the two",
            )
            if self.fraction is not None:
                require(
                    self.chance is not None, f"response '{self.name}': fraction needs chance=X to start from"
                )

    @property
    def better(self) -> int:
        """+1 if a larger number of this response is better, -1 if a smaller one is, as a time always is."""
        return 1 if self.direction == "max" and self.reduce != "time_to" else -1


@dataclass(frozen=True)
class Hypothesis:
    """A claim about two arms, or about a factor's main effect, made before the first run.

    With d = treatment - control, and better in the response's direction: `superiority` claims better by
    more than `margin` (0: better at all), `non_inferiority` worse by less than `margin`, `equivalence`
    within `margin` both ways. On scale `ratio` the margin is relative: 0.05 is a ratio within 1/1.05..1.05.
    """

    name: str
    claim: Literal["superiority", "non_inferiority", "equivalence"]
    treatment: str = ""  # an arm; or
    factor: str = ""  # a factor with two levels, of which the main effect is claimed
    control: str = ""  # an arm; default: the study's baseline
    response: str = ""  # name of a response; default: the first
    margin: float = 0.0
    scale: Literal["difference", "ratio"] = "difference"
    test: Literal["paired", "welch"] = "paired"
    primary: bool = True  # in the family that Holm's correction covers
    text: str = ""  # the claim in words

    def __post_init__(self) -> None:
        require(
            bool(self.treatment) != bool(self.factor),
            f"hypothesis '{self.name}': give treatment='ARM' or factor='NAME', one of the two",
        )
        require(self.margin >= 0, f"hypothesis '{self.name}': margin={self.margin} must be 0 or more")
        if self.claim != "superiority":
            require(self.margin > 0, f"hypothesis '{self.name}': {self.claim} needs a margin above 0")


@dataclass(frozen=True)
class Expectation:
    """What was expected, in words; with `response` also in numbers, to which what was measured is held.

    `response` is the name of a response of the study: the report judges it. The bounds are of the ratio to
    the baseline, over paired seeds, or with `against="nothing"` of the arm's own mean. Or it is `speedup`,
    the step time without the factor over that with it (or of the baseline over the arm's), or `memory`, the
    peak with it over that without: `bench step` measures those. Nothing here bears on how results are read,
    so it is no part of the plan.
    """

    text: str
    factor: str = ""  # of two levels
    arm: str = ""  # instead of a factor
    response: str = ""  # empty: words alone
    low: float | None = None  # None: open on that side
    high: float | None = None
    against: Literal["baseline", "nothing"] = "baseline"

    def __post_init__(self) -> None:
        what = f"expectation '{self.text}'"
        require(bool(self.text.strip()), "an expectation has no text")
        require(not (self.factor and self.arm), f"{what}: give factor='NAME' or arm='ARM', not both")
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not self.response:
            require(not bounds, f"{what}: low and high need response='NAME'")
            return
        require(bool(self.factor or self.arm), f"{what}: of what? Give factor='NAME' or arm='ARM'")
        require(bool(bounds), f"{what}: give low, high or both")
        said = f"{what}: low={self.low}, high={self.high}"
        require(bounds == sorted(bounds), f"{said}: the smaller one first")
        require(bounds[0] > 0 or not self.relative, f"{said}: positive ratios")
        require(
            self.relative or not self.benchmarked, f"{what}: {self.response} is against the baseline alone"
        )

    @property
    def benchmarked(self) -> bool:
        """Whether it is of the step itself, which `bench step` measures, and not of the runs' results."""
        return self.response in BENCHMARKED

    @property
    def relative(self) -> bool:
        """Whether its bounds are ratios to the baseline."""
        return self.against == "baseline"


@dataclass(frozen=True)
class LearningRate:
    """How each arm gets its rate: a grid on tuning seeds; results come from the study's own, fresh seeds.

    A rate is eligible if none of its tuning runs diverged. `best_mean` takes the eligible rate with the
    best mean response, `largest_stable` the largest eligible one. An optimum at the edge of the grid
    extends the grid by its own ratio, up to `extend` times, and is flagged if it stays there.
    An arm whose good rates lie elsewhere has a grid of its own in `grids`.
    """

    grid: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    rule: Literal["best_mean", "largest_stable"] = "best_mean"
    response: str = ""  # name of a response; default: the first
    extend: int = 1
    grids: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # arm -> its own grid

    def __post_init__(self) -> None:
        for where, grid in {
            "grid": self.grid,
            **{f"grids['{arm}']": g for arm, g in self.grids.items()},
        }.items():
            rates = list(grid)
            require(bool(rates) and rates == sorted(set(rates)) and rates[0] > 0,
                    f"learning_rate.{where}={grid}: positive rates in rising order")  # fmt: skip
        require(bool(self.tuning_seeds), "learning_rate.tuning_seeds=(): give at least one")
        require(self.extend >= 0, f"learning_rate.extend={self.extend}: 0 or more")

    def grid_of(self, arm: str) -> tuple[float, ...]:
        """The rates that an arm tries."""
        return tuple(self.grids.get(arm, self.grid))

    @property
    def most_rates(self) -> int:
        """Rates of the arm that tries most."""
        return max(map(len, (self.grid, *self.grids.values())))


@dataclass(frozen=True)
class Run:
    """One run of a study: what the members of an arm's cohorts differ in, and its frozen identity."""

    index: int
    arm: str
    phase: Phase
    seed: int
    learning_rate: float
    fingerprint: str
    id: str


@dataclass(frozen=True)
class Study:
    """A base config, what is varied, and what is asked. `base` is None in a study read back from disk."""

    name: str
    factors: tuple[Factor, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    responses: tuple[Response, ...]
    base: ConfigDict | None = field(default=None, compare=False)
    hypotheses: tuple[Hypothesis, ...] = ()
    learning_rate: LearningRate | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baseline: str = ""  # default: the arm with every factor at its reference
    alpha: float = 0.05
    title: str = ""
    expectations: tuple[Expectation, ...] = ()  # to be printed beside what was measured
    extra_report: str = ""  # `package.module:function` that adds files to the report, see `report.extra`
    # Arms that a document trains one after another, each chain on a GPU: `plan` says what that takes beside its own.
    chains: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        require(NAME.fullmatch(self.name) is not None, f"name '{self.name}': letters, digits, '_', '-', '.'")
        for what in ("factors", "arms", "responses", "hypotheses"):
            names = [item.name for item in getattr(self, what)]
            twice = sorted({n for n in names if names.count(n) > 1})
            require(not twice, f"two {what} are named '{twice[0] if twice else ''}'")
        for what in ("arms", "seeds", "responses"):
            require(bool(getattr(self, what)), f"{what} is empty; give at least one")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds={self.seeds}: one is given twice")
        for arm in self.arms:
            self._check_arm(arm)
        if not self.baseline:
            plain = [arm.name for arm in self.arms if not self.set_levels(arm.name)]
            require(
                bool(plain), "no arm has every factor at its reference; name the baseline with baseline='ARM'"
            )
            object.__setattr__(self, "baseline", plain[0])
        self.arm(self.baseline)
        for group, members in self.groups.items():
            require(group != "all", "group 'all' is always there and holds every arm; use another name")
            for member in members:
                self.arm(member)
        for h in self.hypotheses:
            self._check_hypothesis(h)
        if (rule := self.learning_rate) is not None:
            reused = sorted(set(rule.tuning_seeds) & set(self.seeds))
            require(
                not reused, f"seed {reused[:1]} both tunes the rate and reports; reported seeds must be fresh"
            )
            self.response(rule.response)
            for arm in rule.grids:
                self.arm(arm)
        for expected in self.expectations:
            self._check_expectation(expected)
        for arm in (arm for chain in self.chains for arm in chain):
            self.arm(arm)
        require(
            not self.extra_report or re.fullmatch(r"\w+(\.\w+)*:\w+", self.extra_report) is not None,
            f"extra_report='{self.extra_report}': write it as 'package.module:function'",
        )

    def _check_expectation(self, expected: Expectation) -> None:
        require(isinstance(expected, Expectation), f"expectations: write Expectation({expected!r})")
        if expected.response and not expected.benchmarked:
            self.response(expected.response)
        if expected.factor:
            levels = len(self.factor(expected.factor).levels)
            require(
                levels == 2,
                f"expectation '{expected.text}': factor '{expected.factor}' has {levels} levels, not 2; name an arm",
            )
        if expected.arm:
            require(
                self.arm(expected.arm).name != self.baseline or not expected.relative,
                f"expectation '{expected.text}' compares the baseline with itself",
            )

    def _check_arm(self, arm: Arm) -> None:
        touched: dict[str, str] = {}
        for name, level in arm.levels.items():
            factor = self.factor(name)
            if level not in factor.levels:  # the suggestion takes time, which `status` of many arms has not
                near = suggestion(level, factor.levels)
                raise UserError(f"study: arm '{arm.name}': factor '{name}' has no level '{level}'; {near}")
            for path in factor.levels[level]:
                require(
                    path not in _NOT_AN_ARMS and not path.startswith("host."),
                    f"factor '{name}' changes '{path}'; seeds, labels and hosts are not an arm's to change",
                )
                require(
                    path != "optim.learning_rate" or self.learning_rate is None,
                    f"factor '{name}' changes '{path}', which the study's learning_rate rule chooses; drop one",
                )
                require(
                    path not in touched,
                    f"arm '{arm.name}': factors '{touched.get(path)}' and '{name}' both change '{path}'",
                )
                touched[path] = name

    def _check_hypothesis(self, h: Hypothesis) -> None:
        response = self.response(h.response)
        falls = response.direction == "min" or response.reduce == "time_to"
        require(
            h.margin < 1 or not (falls and h.claim == "superiority" and h.scale == "ratio"),
            f"hypothesis '{h.name}': margin={h.margin}: nothing positive is lower by 100 %; give less than 1",
        )
        if h.treatment:
            treatment, control = self.arm(h.treatment).name, self.arm(h.control or self.baseline).name
            require(treatment != control, f"hypothesis '{h.name}' compares arm '{control}' with itself")
        else:
            levels = self.factor(h.factor).levels
            require(
                len(levels) == 2,
                f"hypothesis '{h.name}': factor '{h.factor}' has {len(levels)} levels, not 2",
            )

    # ------------------------------------------------------------------------------- looking things up

    def _find(self, what: str, name: str, items: Iterable[Any]) -> Any:
        by_name = {item.name: item for item in items}
        if name not in by_name:
            raise UserError(f"study {self.name}: no {what} '{name}'; {suggestion(name, by_name)}")
        return by_name[name]

    def arm(self, name: str) -> Arm:
        """The arm of that name, or a UserError with the nearest one."""
        return self._find("arm", name, self.arms)

    def factor(self, name: str) -> Factor:
        """The factor of that name, or a UserError with the nearest one."""
        return self._find("factor", name, self.factors)

    def response(self, name: str = "") -> Response:
        """The response of that name; the first one, which is the primary, without a name."""
        return self._find("response", name, self.responses) if name else self.responses[0]

    def select(self, group: str = "", arms: Sequence[str] = ()) -> tuple[Arm, ...]:
        """The arms of a group (default `all`) that are also named in `arms` (default: every one), in order."""
        groups = {"all": tuple(arm.name for arm in self.arms), **self.groups}
        if group and group not in groups:
            arm_too = f" ('{group}' is an arm: use --arm)" if group in groups["all"] else ""
            raise UserError(f"study {self.name}: no group '{group}'; {suggestion(group, groups)}{arm_too}")
        wanted = {self.arm(name).name for name in arms} or set(groups["all"])
        return tuple(arm for arm in self.arms if arm.name in groups[group or "all"] and arm.name in wanted)

    def set_levels(self, arm: str) -> dict[str, str]:
        """The factors that an arm takes from their reference, with the level it gives them."""
        own = self.arm(arm).levels
        return {f.name: own[f.name] for f in self.factors if own.get(f.name, f.reference) != f.reference}

    def levels(self, arm: str) -> dict[str, str]:
        """The level of every factor in an arm."""
        own = self.arm(arm).levels
        return {f.name: own.get(f.name, f.reference) for f in self.factors}

    def changes(self, levels: Mapping[str, str]) -> dict[str, Any]:
        """Dotted config paths and values of a combination of levels."""
        pairs = (self.factor(name).levels[level] for name, level in levels.items())
        return {path: value for changes in pairs for path, value in changes.items()}

    def config(self, arm: str) -> ConfigDict:
        """The config of an arm: a copy of the base with the arm's changes and the study's seeds."""
        return self.combine(arm, self.set_levels(arm))

    def combine(self, label: str, levels: Mapping[str, str]) -> ConfigDict:
        """The config of any combination of levels, named `label`; it need not be an arm."""
        if self.base is None:
            raise UserError(
                f"study {self.name}: was read back from disk and has no base config; give its config file"
            )
        config = copy.deepcopy(self.base)  # values that follow from others go on doing so
        for path, value in self.changes(levels).items():
            set_path(config, path, value)
        config.study, config.arm, config.seeds = self.name, label, tuple(self.seeds)
        return config

    # ------------------------------------------------------------------------------- as data

    def to_dict(self) -> dict[str, Any]:
        """The declaration without the base config, in JSON's types."""
        return dataclasses.asdict(dataclasses.replace(self, base=None)) | {"base": None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """The declaration that `to_dict` of any version wrote; a UserError names the field that is wrong."""
        values = {"extra_report": "", "chains": (), **values}
        expected = values.get("expectations")
        if isinstance(expected, list | tuple):
            values = {**values, "expectations": [expectation_fields(item) for item in expected]}
        if isinstance(rule := values.get("learning_rate"), Mapping):  # written before arms had grids
            values = {**values, "learning_rate": {"grids": {}, **rule}}
        return from_mapping(cls, values, "study.")

    @property
    def plan(self) -> dict[str, Any]:
        """The analysis plan: all that decides how results will be read. Texts and groups are no part of it."""
        left_out = ("base", "groups", "title", "expectations", "extra_report", "chains")
        plan = {key: value for key, value in self.to_dict().items() if key not in left_out}
        claims = [{k: v for k, v in claim.items() if k != "text"} for claim in plan["hypotheses"]]
        rule = plan["learning_rate"]
        if (
            rule is not None and not rule["grids"]
        ):  # without any the plan is what it was before there were such
            plan["learning_rate"] = {k: v for k, v in rule.items() if k != "grids"}
        return {**plan, "hypotheses": claims}

    @property
    def plan_hash(self) -> str:
        """16 hex digits of the SHA-256 of the analysis plan."""
        return hashlib.sha256(canonical(self.plan).encode()).hexdigest()[:16]


def expectation_fields(item: Any) -> Any:
    """The fields of an expectation as any version has written it: at first words, then without `against`."""
    if isinstance(item, str):
        return dataclasses.asdict(Expectation(item))
    return {"against": "baseline", **item} if isinstance(item, Mapping) else item


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Study:
    """The study of `file.py:arg`, with `--config.path=text` overrides applied to its base config.

    Raises:
      UserError: anything that is wrong with the file, its argument, the study or an override.
    """
    study = userfile.call(spec, "get_study", Study, "a Study")
    if study.base is None:
        raise UserError(f"{spec.partition(':')[0]}: the study has no base config; give base=new_config(…)")
    overrides = list(overrides)
    varied = {path: f.name for f in study.factors for level in f.levels.values() for path in level}
    for path, _ in overrides:
        if path in _NOT_AN_ARMS:
            raise UserError(f"config.{path}: is the study's to say; edit it in {spec.partition(':')[0]}")
        if path in varied:
            raise UserError(f"config.{path}: is what factor '{varied[path]}' varies; override another field")
    override(study.base, overrides)
    return study
