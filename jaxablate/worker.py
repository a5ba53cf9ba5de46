"""Trains some runs of a frozen study: `python -m jaxablate.worker STUDY_DIR --arm=ARM --runs=ID,ID`.

A process of its own for each cohort, so that a crash takes nothing else along; or several, each with this
command, for a cohort that one machine cannot hold (`--processes`). It claims its runs before it
imports jax, since that takes seconds in which another launcher would start on the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from jaxablate.claims import Claim, Claimed
from jaxablate.config import Cohort, HostConfig, from_dict
from jaxablate.errors import StorageError, UserError, suggestion
from jaxablate.manifest import Manifest
from jaxablate.places import Processes, place_of
from jaxablate.stopping import EXIT_AGAIN, EXIT_DISK, EXIT_PAUSED, EXIT_TAKEN, Paused, Stopped
from jaxablate.structure import from_mapping
from jaxablate.study import Run

EPILOG = (
    "exit codes: 0 done, 1 internal error, 2 bad input, 74 the disk, 75 stopped cleanly, 76 another process has "
    "the runs, 77 the stage of --until is done"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m jaxablate.worker", None, "Train some runs of a frozen study as one cohort.", EPILOG
    )
    parser.allow_abbrev = False
    parser.add_argument("study", metavar="STUDY_DIR", help="the directory of a study that was run")
    parser.add_argument("--arm", required=True, help="the arm of the runs")
    parser.add_argument(
        "--runs", required=True, metavar="ID,ID", help="the runs, by their directories' names"
    )
    parser.add_argument("--host", default="{}", metavar="JSON", help="fields of config.host to replace")
    parser.add_argument("--log", default="", help="the file this process writes to, to note in the attempts")
    parser.add_argument("--parent", type=int, default=0, metavar="PID", help="stop when this parent has gone")
    parser.add_argument("--until", default="", metavar="STAGE", help="stop at the end of this stage")
    parser.add_argument(
        "--processes", choices=get_args(Processes), default="one",
        help="this process is all there is, or one of several: a task of a SLURM step, or as JAXABLATE_* say",
    )  # fmt: skip
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    if args.parent:
        threading.Thread(target=_stop_without, args=(args.parent,), daemon=True).start()
    try:
        place = place_of(args.processes, os.environ)
        leads = place is None or place.process == 0
        logging.getLogger("jaxablate").setLevel(logging.INFO if leads else logging.WARNING)
        manifest = Manifest.load(args.study)
        runs = find_runs(manifest, args.arm, args.runs.split(","))
        with contextlib.ExitStack() as stack:
            claims = {}
            for run in (
                runs if leads else ()
            ):  # in their order: of two workers that overlap, one gets them all
                where = manifest.run_dir(run)
                where.create(manifest.config_of(run))
                claims[run.id] = stack.enter_context(Claim(where.claim))
            cohort = rebuild(manifest, runs, _read_host(args.host))

            from jaxablate.distributed import joined
            from jaxablate.train import train

            if place is not None:
                stack.enter_context(joined(place))
            train(cohort, claims, args.log, runs[0].phase, args.until)
    except Claimed as claimed:
        sys.stderr.write(f"left alone: {claimed}\n")
        return EXIT_TAKEN
    except Paused as paused:
        sys.stderr.write(f"paused: {paused}\n")
        return EXIT_PAUSED
    except Stopped as stopped:
        sys.stderr.write(f"stopped: {stopped}\n")
        return EXIT_AGAIN
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_DISK if isinstance(error, StorageError) else 2
    return 0


def find_runs(manifest: Manifest, arm: str, ids: Sequence[str]) -> list[Run]:
    """The runs of an arm with these ids, in the order of the frozen list."""
    own = {run.id: run for run in manifest.runs if run.arm == arm}
    for id in ids:
        if id not in own:
            near = suggestion(id, own) if own else f"the study has no runs of arm '{arm}'"
            raise UserError(f"--runs={id}: no such run of arm '{arm}' in {manifest.path}; {near}")
    return sorted((own[id] for id in set(ids)), key=lambda run: run.index)


def rebuild(manifest: Manifest, runs: Sequence[Run], host: Mapping[str, Any]) -> Cohort:
    """The cohort of frozen runs, on the study's host config with the fields in `host` replaced.

    Raises:
      UserError: the program that is installed would compute something else than what was frozen.
    """
    if manifest.path.resolve().name != manifest.study.name:
        raise UserError(f"{manifest.path}: the directory of study '{manifest.study.name}' must have its name")
    values = {**manifest.host, **host, "workdir": str(manifest.path.parent)}
    here = from_mapping(HostConfig, values, "config.host.")
    configs = [from_dict(manifest.config_of(run), here) for run in runs]
    for run, found in zip(runs, configs, strict=True):
        if found.fingerprint != run.fingerprint:
            raise UserError(
                f"{manifest.run_dir(run).path}: was frozen as {run.fingerprint}, and this version of the program "
                f"makes {found.fingerprint} of the same config; use the version that froze it, or another --workdir"
            )
    return Cohort(tuple(configs))


def _read_host(text: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f'--host={text}: must be a JSON object of fields of config.host, such as {{"split": 2}}'
        )
    return values


def _stop_without(parent: int) -> None:
    """Asks this process to stop at a step boundary once `parent` is no longer its parent.

    By polling, which works on every Unix; a launcher that is killed cannot pass a signal on.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
