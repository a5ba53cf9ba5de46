"""A finished run's adapters as files that the library peft reads.

    python -m jaxablate.studies.vqa.export --run=runs/vqa/exp2_ordered/seed0_… --output=adapters/exp2

A run of several experts gets a folder for each below that one: `expert_1` and so on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.errors import UserError
from jaxablate.studies.vqa import command

if TYPE_CHECKING:
    from jaxablate.trained import Which


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the adapters, prints their folders; returns the exit code."""
    parser = command.parser("export", "Write the adapters of a finished run as peft has them.")
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=Path,
        metavar="DIR",
        help="the run's directory: <workdir>/<study>/<arm>/<run>",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write into")
    add(
        "--checkpoint", choices=("final", "best"), default="final",
        help="of the run (default: final, which its test questions were asked)",
    )  # fmt: skip
    return command.carried_out(lambda: _export(parser.parse_args(argv)))


def _export(args: argparse.Namespace) -> str:
    return "\n".join(str(folder) for folder in export_run(args.run, args.output, args.checkpoint))


def export_run(run_dir: Path, output: Path, which: Which = "final") -> list[Path]:
    """Writes the adapters of a run, each into a folder of its own; returns the folders.

    Raises:
      UserError: there is no such run of this study, it has not finished, or its checkpoint is gone or damaged.
    """
    import flax.linen as nn  # here: --help waits for none of these
    import jax

    from jaxablate import config, disk, trained
    from jaxablate.config import HostConfig
    from jaxablate.runstore import RunDir
    from jaxablate.studies.vqa import adapters
    from jaxablate.studies.vqa.task import VqaTask

    where = RunDir(run_dir)
    if not where.config.is_file():
        raise UserError(
            f"--run={run_dir}: holds no config.json; give the directory of a run, <workdir>/<study>/<arm>/<run>"
        )
    values = disk.read_json(where.config)
    if config.import_task(values["task"]) is not VqaTask:
        raise UserError(f"--run={run_dir}: is no run of this study, but of the task '{values['task']}'")
    if (state := where.state()) != "done":
        raise UserError(f"--run={run_dir}: is {state}, not done; let it finish first")
    run = config.from_dict(values, HostConfig())
    task = VqaTask(run, jax.default_backend())
    params = nn.unbox(trained.restore(task, run, where, which).variables["params"])
    experts = {name: output / name for name in params} if run.data.regimen == "experts" else {}
    if len(experts) < 2:  # one expert alone is a job's: its adapter is the run's
        (own,) = params.values() if experts else (params,)
        adapters.export(output, own, run.model, run.data)
        return [output]
    for name, folder in experts.items():
        adapters.export(folder, params[name], run.model, run.data)
    return [*experts.values()]


if __name__ == "__main__":
    sys.exit(main())
