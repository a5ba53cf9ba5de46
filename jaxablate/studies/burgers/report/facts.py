"""What the study's own pages say of each run: its architecture, its scores, and the milestones that it reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from jaxablate import disk
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError

# Predictions: the baseline of all comparisons; with the corrector; and with the choice among corrected candidates.
PLAIN, CORRECTED, CHOSEN = "operator", "corrected", "conditioned"


@dataclass(frozen=True)
class Facts:
    """One run with its resolved config; {} if that cannot be read."""

    run: Result
    config: Mapping[str, Any]

    # --------------------------------------------------------------------------------- architecture

    def _model(self, *path: str) -> Any:
        found: Any = self.config.get("model", {})
        for name in path:
            found = found.get(name, {})
        return None if found == {} else found

    @property
    def tokens(self) -> int | None:
        return self._model("encoder", "tokens")

    @property
    def architecture(self) -> Mapping[str, Any]:
        """The architecture's columns of `architecture_comparison.csv`."""
        kind = self._model("core", "kind")
        return {
            "tokens": self.tokens,
            "latent_dim": self._model("encoder", "dim"),
            "architecture": kind,
            "attention": self._model("core", "attention"),
            "depth": self._layers,
            "drop_path": 0.0 if kind == "pdet_unet" else self._model("core", "drop_path"),  # a U has none
            "hidden_dim": self._model("core", "hidden"),
        }

    @property
    def _layers(self) -> int | None:
        """Layers that a token goes through: a U has those of all levels but the last one twice."""
        if self._model("core", "kind") != "pdet_unet":
            return self._model("core", "depth")
        *levels, bottom = self._model("core", "depths")
        return 2 * sum(levels) + bottom

    @cached_property
    def stages(self) -> Mapping[str, tuple[int, int]]:
        """The steps, (first, last], of each stage, in order."""
        lengths: dict[str, int] = {}
        if self._model("encoder", "kind") == "trained":
            lengths["autoencoder"] = self._model("autoencoder", "steps") or 0
        lengths["operator"] = self.config.get("training", {}).get("steps", 0)
        lengths |= {name: self._model(name, "steps") or 0 for name in ("corrector", "distill")}
        lengths = {name: steps for name, steps in lengths.items() if steps}
        ends = list(accumulate(lengths.values()))
        return {name: (end - lengths[name], end) for name, end in zip(lengths, ends, strict=True)}

    @property
    def conditions(self) -> bool:
        """Whether its predictions are to be conditioned at test time."""
        return "corrector" in self.stages and bool(self._model("conditioning", "candidates"))

    # --------------------------------------------------------------------------------------- scores

    def final(self, name: str) -> float | None:
        """The last value of val/`name`; None of a run that has no result or no such score."""
        if self.run.state != "done" or self.run.unread:
            return None
        last = [row[f"val/{name}"] for row in self.run.rows if f"val/{name}" in row][-1:]
        return last[0] if last else None

    @property
    def in_latent_space(self) -> bool:
        """Whether its scores are of tokens, because nothing decodes them to fields."""
        return self.final(f"nrmse_{PLAIN}") is None and self.final("latent_nrmse") is not None

    def error(self, name: str, prediction: str) -> float | None:
        """`nrmse` or `mse` of a prediction, in the fields' unit where they can be had."""
        if self.in_latent_space:
            return self.final(f"latent_{name}" + (f"_{prediction}" if prediction != PLAIN else ""))
        return self.final(f"{name}_{prediction}")

    def law(self, name: str) -> float | None:
        """`conservation_gap`, `boundary_violation` or `negativity`: upstream's of tokens where there are no fields."""
        return self.final(f"latent_{name}" if self.in_latent_space else name)

    @property
    def doing_nothing(self) -> float | None:
        """The error of predicting that everything stays as it is, where this run's errors are."""
        return self.final("latent_nrmse_persistence" if self.in_latent_space else "nrmse_persistence")

    def loss_at_end_of(self, stage: str) -> float | None:
        """The last training loss that was logged in a stage; None if the run did not get to its end."""
        first, end = self.stages.get(stage, (0, 0))
        logged = [row for row in self.run.rows if "train/loss" in row and first < row["step"] <= end]
        return logged[-1]["train/loss"] if logged and (self.run.steps or 0) >= end else None

    @property
    def improvement(self) -> float | None:
        """The document's: by how many percent corrector and choice together lower the operator's error."""
        return self.gain(PLAIN, CHOSEN)

    def gain(self, before: str, after: str) -> float | None:
        """By how many percent of it the error of one prediction is above another's; negative where it is below."""
        base, other = self.error("nrmse", before), self.error("nrmse", after)
        return 100 * (base - other) / base if base and other is not None else None

    # ----------------------------------------------------------------------------------- milestones

    @cached_property
    def milestones(self) -> Mapping[str, bool | None]:
        """Milestone -> whether the run reached it; None where it has no meaning for the run."""

        def below(stage: str, bound: float) -> bool | None:
            loss = self.loss_at_end_of(stage)
            return (loss is not None and loss < bound) if stage in self.stages else None

        rows = self.run.rows
        gradients = [row.get("train/grad_norm") for row in rows if "train/grad_norm" in row]
        finite = all(norm is not None and math.isfinite(norm) for norm in gradients)
        last = max((end for _, end in self.stages.values()), default=0)
        logged = [self.error("nrmse", PLAIN), *([self.error("nrmse", CHOSEN)] if self.conditions else [])]
        logged += [self.law(name) for name in ("conservation_gap", "boundary_violation", "negativity")]
        return {
            "final loss of the operator below 0.001": below("operator", 1e-3),
            "final loss of the corrector below 0.01": below("corrector", 1e-2),
            "every gradient finite": bool(gradients) and finite and self.run.state != "diverged",
            "all steps of all stages": self.run.state == "done" and last > 0 and self.run.steps == last,
            "baseline, conditioning and physics scored": None not in logged,
            "checkpoints there in full": self._checkpoints_there(),
        }

    def _checkpoints_there(self) -> bool:
        """Whether each checkpoint has all of its files at the size that its manifest gives, the last one among them."""
        if self.run.dir is None:
            return False
        manifests = [path for path in self.run.dir.checkpoints.glob("*.json") if path.stem.isdigit()]
        for manifest in manifests:
            try:
                files = disk.read_json(manifest)["files"]
            except (UserError, KeyError):
                return False
            paths = {manifest.with_suffix("") / name: size for name, (size, _) in files.items()}
            if not all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
                return False
        return self.run.steps is not None and self.run.steps in {int(path.stem) for path in manifests}


def of_runs(results: Results) -> tuple[Facts, ...]:
    """The facts of all confirmatory runs, arms as declared, by seed."""
    return tuple(Facts(run, _config(run)) for arm in results.study.arms for run in results.of(arm.name))


def _config(run: Result) -> Mapping[str, Any]:
    if run.dir is None or not run.dir.config.is_file():
        return {}
    try:
        return disk.read_json(run.dir.config)
    except UserError:
        return {}  # the report itself says that the run is damaged


def by_arm(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The runs of each arm, in order."""
    found: dict[str, list[Facts]] = {}
    for one in facts:
        found.setdefault(one.run.arm, []).append(one)
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None of nothing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None
