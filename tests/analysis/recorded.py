"""Made-up studies with the files that their runs would have left: metrics, timings, configs, event files."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxablate import disk, metrics
from jaxablate.analysis.results import Result, Results
from jaxablate.events import experiment_hparams, run_hparams, session_group
from jaxablate.metrics import MetricsLog
from jaxablate.runstore import RunDir
from jaxablate.study import Study

_MODEL = {"image": {"attention": {"impl": "plain"}, "norm": "layernorm", "ffn": "gelu"}}


def config_of(study: Study, run: Result) -> dict[str, Any]:
    """What the run's config.json holds."""
    config: dict[str, Any] = {
        "study": study.name, "arm": run.arm, "scale": "tiny", "task": "made", "seed": run.seed,
        "model": copy.deepcopy(_MODEL), "optim": {"learning_rate": run.learning_rate, "weight_decay": 0.01},
    }  # fmt: skip
    for path, value in study.changes(study.set_levels(run.arm)).items():
        *sections, last = path.split(".")
        section = config
        for key in sections:
            section = section[key]
        section[last] = value
    return config


def curve(run: Result, step: int, last: int) -> dict[str, float]:
    """The validation row of a step: it ends at the values that the run has."""
    share = 1 - math.exp(-4 * step / last)
    auroc, loss = run.values.get("macro_auroc") or 0.6, run.values.get("loss") or 4.0
    return {"val/macro_auroc": 0.5 + (auroc - 0.5) * share, "val/loss": 3.5 + (loss - 3.5) * share}


def record(results: Results, path: Path, every: int = 25) -> Results:
    """The same results with a run directory for each run that was started, below `path`."""
    study, runs = results.study, []
    best = f"best/{study.responses[0].metric.replace('/', '_')}"
    values: dict[str, list[Any]] = {}
    for run in results.runs:
        config = config_of(study, run)
        for key, value in run_hparams(config).items():
            values.setdefault(key, []).append(value)
        run_dir = RunDir(path / run.arm / run.run_id)
        if run.state != "pending":
            _record(run, run_dir, config, every)
        rows, perf_rows = (disk.read_jsonl(path)[0] for path in (run_dir.metrics, run_dir.perf))
        runs.append(dataclasses.replace(run, dir=run_dir, rows=rows, perf_rows=perf_rows))
    varied = {k: v for k, v in values.items() if len(set(v)) > 1 or k == "optim.learning_rate"}
    experiment_hparams(path, varied, [best, "val/loss", "train/loss"])  # as `record.declare_experiment` does
    return dataclasses.replace(results, runs=tuple(runs), path=path)


def _record(run: Result, run_dir: RunDir, config: dict[str, Any], every: int) -> None:
    run_dir.create(config)
    group = session_group(run.arm, run.learning_rate)
    last = run.steps or 100
    with MetricsLog(run_dir, resume_step=-1, hparams=run_hparams(config), group=group) as log:
        for step in range(every, last + 1, every):
            log.write(step, {"train/loss": 3 * math.exp(-step / 200) + 0.1 * run.seed, "train/lr": 1e-3})
            log.write_perf(step, {"perf/steps_per_sec": run.perf.get("steps_per_sec", 1.0) + step / last})
            log.write(step, curve(run, step, last))
        if run.state == "diverged":
            log.write(last + 1, {"train/loss": None})
        rows, _ = disk.read_jsonl(run_dir.metrics)
        log.finish(run.state, metrics.statistics(rows, {"val/macro_auroc": "max", "val/loss": "min"}))
