"""What a finished run says in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxablate.analysis.advice import ADVICE
from jaxablate.analysis.curves import terminal_curve
from jaxablate.analysis.results import knowing_nothing
from jaxablate.runstore import RunDir, read_steps


def describe(summaries: Sequence[Mapping[str, Any]], workdir: str) -> str:
    """A few lines for each run, the curve of the first one's response, and where the files are."""
    first = summaries[0]
    response = first["response"]
    arm_dir = Path(workdir) / first["experiment_name"]
    lines = [f"{first['experiment_name']}   {response}, val/loss   ({_kernels(first)})"]
    for run in summaries:
        lines.append(f"  {run['run_id']:<32} {_outcome(run, response)}")
    rows, _ = read_steps(RunDir(arm_dir / first["run_id"]).metrics)
    if any(response in row for row in rows):
        lines += ["", terminal_curve(rows, response)]
    perf = first["perf"]
    if perf["steps_per_sec"]:
        members = f" for {first['cohort_size']} members at once" if first["cohort_size"] > 1 else ""
        lines += ["", f"{perf['steps_per_sec']:.1f} steps/s{members}, {perf['compile_sec']:.1f} s to compile"]
    lines += [f"summary: {arm_dir / first['run_id'] / 'summary.json'}"]
    lines += [f"curves:  {arm_dir / first['run_id'] / 'loss_curves.png'}"]
    lines += [f"table:   {arm_dir / first['run_id'] / 'metrics.csv'}"]
    lines += [f"tensorboard --logdir {arm_dir.parent}"]
    return "\n".join(lines)


def _outcome(run: Mapping[str, Any], response: str) -> str:
    if run["state"] == "diverged":
        at, loss = run["diverged"]["step"], run["diverged"]["last_loss"]
        return f"diverged at step {at}, loss before it {loss}: {ADVICE['diverged']}"
    stats = run["statistics"].get(response.replace("/", "_"), {})
    loss = run["statistics"].get("val_loss", {})
    if stats.get("best") is None:
        return run["state"]
    text = f"{stats['initial']:.3f} -> {stats['final']:.3f}, best {stats['best']:.3f} at step {stats['best_step']}"
    if run.get("stopped_at") is not None:
        text += f", stopped at step {run['stopped_at']}"
    if run.get("remark"):
        text += f", {run['remark']}"
    if nothing := knowing_nothing(run).get(response):
        text += f" ({nothing.metric} is {nothing.value:.3f})"
    return f"{text}; val/loss {loss['final']:.3f}" if loss.get("final") is not None else text


def _kernels(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{slot}: {name}" for slot, name in run["kernels"].items()) or "no kernels to choose"
