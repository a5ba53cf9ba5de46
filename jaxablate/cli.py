"""The verbs: `jaxablate check|plan|run|submit|status|retry|cancel|report|export|leaderboard|promote|sample STUDY`,
`jaxablate validate CONFIG`, `jaxablate bench step STUDY`, `jaxablate bench kernels`, `jaxablate bench speedups STUDY`
and `jaxablate data tokenize TEXT`.

Data goes to stdout, progress and logs to stderr. Whatever a verb needs is imported when it runs, so that
`--help` and `status` start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from jaxablate.bench import verbs
from jaxablate.errors import UserError
from jaxablate.sampling import verbs as sampling
from jaxablate.schedule import verbs as running
from jaxablate.schedule.plan import verbs as planning
from jaxablate.schedule.slurm import verbs as slurm
from jaxablate.text import verbs as text

if TYPE_CHECKING:
    from jaxablate.analysis.results import Results
    from jaxablate.manifest import Manifest

CHECK_FAILED = 3
INTERNAL = 70  # EX_SOFTWARE: told apart from runs that failed
INTERRUPTED = 130
EXIT_CODES = (
    "exit codes: 0 fine, 1 some runs failed, 2 bad input, 3 a check failed, 70 internal error, "
    "75 stopped: run again to go on, 130 interrupted"
)
STUDY_FILE = "study file and its argument, such as configs/ctclip.py:scale=tiny"
STUDY_ANY = "study file, or the directory of a study that was run, such as runs/ctclip"

Args = argparse.Namespace
Overrides = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and carries the verb out; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxablate").setLevel(logging.INFO)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, "")  # a study's own task lies beside it, and `python -m` would find it
    try:
        args, rest = _parser().parse_known_args(argv)
        overrides = _overrides(args, rest)
        return args.run(args, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # the last resort of the program: whatever it is, it is not the user's input
        traceback.print_exc()
        print(
            "error: this is a fault of jaxablate, not of your input; what it had written is whole",
            file=sys.stderr,
        )
        return INTERNAL


# ---------------------------------------------------------------------------------------- the verbs


def _check(args: Args, overrides: Overrides) -> int:
    from jaxablate import study
    from jaxablate.check import check_study

    if args.execute and args.static:
        raise UserError("--static: not allowed with --execute; drop one of them")
    execute = "yes" if args.execute else "no" if args.static else "auto"
    declared = study.load(args.study, overrides)
    arms = [arm.name for arm in declared.select(args.group, args.arm)]
    if not arms:
        raise UserError(
            f"--group={args.group} --arm={' '.join(args.arm)}: no arm is in both; drop one of them"
        )
    report = check_study(declared, spec=args.study, arms=arms, execute=execute, jobs=args.jobs)
    _show(args, report.to_dict(), lambda: report.table(verbose=args.verbose))
    return CHECK_FAILED if report.failed else 0


def _validate(args: Args, overrides: Overrides) -> int:
    from jaxablate.validate import validate

    return _finish(args, validate(args.study, overrides, look="static" if args.static else "everything"))


def _plan(args: Args, overrides: Overrides) -> int:
    return _finish(args, planning.plan(args, overrides))


def _run(args: Args, overrides: Overrides) -> int:
    return running.run(args, overrides, lambda outcome: _finish(args, outcome))


def _submit(args: Args, overrides: Overrides) -> int:
    return _finish(args, slurm.submit(args, overrides))


def _status(args: Args, overrides: Overrides) -> int:
    from jaxablate.analysis.goodput import goodput
    from jaxablate.analysis.status import status
    from jaxablate.schedule.slurm.overview import overview

    manifest = _manifest(args, overrides)
    found = status(manifest, arms=args.arm)
    queued = overview(manifest, found.seen)
    found = dataclasses.replace(found, notes=(*queued.notes, *found.notes))
    data, lines = found.to_dict() | {"submissions": queued.to_dict()}, queued.lines()
    if args.goodput:
        spent = goodput(manifest, args.arm)
        data, lines = data | {"goodput": spent.to_dict()}, [*lines, spent.text()]
    _show(args, data, lambda: "\n".join([found.table(), *lines]))
    return 0


def _retry(args: Args, overrides: Overrides) -> int:
    from jaxablate.schedule.slurm import marks

    runs = marks.retry(_manifest(args, overrides), tuple(args.arm), tuple(args.seeds))
    _show(args, {"retry": [run.id for run in runs]}, lambda: _listed("to be run again", runs))
    return 0


def _cancel(args: Args, overrides: Overrides) -> int:
    from jaxablate.schedule.slurm import marks

    runs = marks.cancel(_manifest(args, overrides), tuple(args.arm), tuple(args.seeds))
    _show(args, {"cancelled": [run.id for run in runs]}, lambda: _listed("cancelled", runs))
    return 0


def _report(args: Args, overrides: Overrides) -> int:
    from jaxablate.analysis import views
    from jaxablate.analysis.board import write_board
    from jaxablate.analysis.report.write import write_report
    from jaxablate.analysis.stats.analyse import analyse

    results = _results(args, overrides)
    for note in views.complete(results):  # such as a run lacks that was killed after its result
        print(f"warning: {note}", file=sys.stderr)
    where = Path(args.out) if args.out else (results.path or Path(results.study.name)) / "report"
    analysis = analyse(results)
    report = write_report(results, analysis, where)
    written = [*report.files]
    if results.path is not None:
        written.append(write_board(results, analysis, where / "tensorboard"))
    _show(
        args,
        {"written": [str(path) for path in written]},
        lambda: f"{report.text()}\nreport: {where / 'report.html'}",
    )
    return 0


def _export(args: Args, overrides: Overrides) -> int:
    from jaxablate.analysis.export import export

    results = _results(args, overrides)
    suffix = "json" if args.format == "rliable" else args.format
    out = Path(args.out or f"{results.study.name}.{suffix}")
    export(results, args.format, out)
    _show(args, {"written": [str(out)]}, lambda: str(out))
    return 0


def _leaderboard(args: Args, overrides: Overrides) -> int:
    from jaxablate.analysis.leaderboard import leaderboard

    board = leaderboard(
        [_directory(spec, overrides) for spec in args.studies],
        Path(args.out),
        response=args.response,
        tags=_names(args.tags),
        notes=args.notes,
    )
    _show(args, board.to_dict(), board.text)
    return 0


def _promote(args: Args, overrides: Overrides) -> int:
    from jaxablate.analysis import results
    from jaxablate.analysis.promote import promote
    from jaxablate.analysis.stats.analyse import analyse

    found = results.load(_manifest(args, overrides))
    promotion = promote(
        found,
        analyse(found),
        args.arm,
        name=args.name or f"{found.study.name}_{args.arm}",
        production_dir=Path(args.production_dir),
        gates=args.gate,
        thresholds=dict(_pairs(args.threshold, "--threshold", "RESPONSE=VALUE")),
        mode="dry run" if args.dry_run else "write",
    )
    board = None
    if args.update_leaderboard and promotion.mode == "write":
        from jaxablate.analysis.leaderboard import leaderboard

        assert found.path is not None, "what was promoted was run here"
        status = {promotion.arm: promotion.name}
        board = leaderboard([found.path], Path(args.update_leaderboard), promoted=status)
    data = promotion.to_dict() | {"leaderboard": board.to_dict() if board else None}
    lines = [f"{board.added} new rows in {board.csv}"] if board else []
    _show(args, data, lambda: "\n".join([promotion.text(), *lines]))
    return 0


def _sample(args: Args, overrides: Overrides) -> int:
    return _finish(args, sampling.sample(args, _manifest(args, overrides)))


def _bench_step(args: Args, overrides: Overrides) -> int:
    return _finish(args, verbs.step(args, overrides))


def _bench_kernels(args: Args, overrides: Overrides) -> int:
    return _finish(args, verbs.kernels(args, overrides))


def _bench_speedups(args: Args, overrides: Overrides) -> int:
    return _finish(args, verbs.speedups(args, overrides))


def _data_tokenize(args: Args, overrides: Overrides) -> int:
    return _finish(args, text.tokenize(args, overrides))


# -------------------------------------------------------------------------------- what they share


def _finish(args: Args, outcome: verbs.Outcome) -> int:
    _show(args, outcome.to_dict(), outcome.text)
    return outcome.exit_code


def _manifest(args: Args, overrides: Overrides) -> Manifest:
    from jaxablate.manifest import Manifest

    return Manifest.load(_directory(args.study, overrides))


def _directory(spec: str, overrides: Overrides) -> Path:
    """The directory of a study; a directory is what it is, so nothing may override its config."""
    from jaxablate.manifest import study_dir

    if overrides and Path(spec).is_dir():
        raise UserError(
            f"{spec}: is the directory of a study; --workdir and --config.PATH are for a study file"
        )
    return study_dir(spec, overrides)


def _results(args: Args, overrides: Overrides) -> Results:
    """The results of a study, or with --from-csv of a table."""
    if not args.from_csv:
        if not args.study:
            raise UserError("STUDY: missing; give a study file, a study's directory, or --from-csv=FILE")
        from jaxablate.analysis import results

        return results.load(_manifest(args, overrides))
    if args.study or overrides:
        what = f"STUDY='{args.study}'" if args.study else "--config.PATH, --workdir"
        raise UserError(f"{what}: a report is on a study or on --from-csv, not on both")
    from jaxablate.analysis.from_csv import from_csv

    return from_csv(
        Path(args.from_csv),
        directions=dict(_pairs(args.direction, "--direction", "RESPONSE=min|max")),
        factors=_names(args.factors),
        baseline=args.baseline,
        log=_names(args.log),
        ignore=_names(args.ignore),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _show(args: Args, data: dict[str, Any], text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=2) if args.json else text())


def _listed(what: str, runs: Sequence[Any]) -> str:
    return "\n".join([f"{len(runs)} {what}", *(f"  {run.arm}/{run.id}" for run in runs)])


def _pairs(items: Sequence[str], flag: str, form: str) -> list[tuple[str, str]]:
    split = [item.partition("=") for item in items]
    for item, (_, equals, _) in zip(items, split, strict=True):
        if not equals:
            raise UserError(f"{flag}={item}: write it as {flag} {form}")
    return [(name, value) for name, _, value in split]


def _overrides(args: Args, rest: Sequence[str]) -> Overrides:
    if not rest and not getattr(args, "workdir", ""):
        return []
    from jaxablate.config import read_overrides

    valid = [option for action in args.parser._actions for option in action.option_strings]
    overrides = read_overrides(rest, valid)
    return [*overrides, ("host.workdir", args.workdir)] if getattr(args, "workdir", "") else overrides


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "jaxablate",
        description="Ablation studies: declare once, check, run, report.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    all_verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str,
        run: Callable[[Args, Overrides], int],
        help: str,
        study: str = STUDY_ANY,
        among: Any = all_verbs,
    ) -> Any:
        own = among.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"--config.PATH=VALUE overrides a field of the base config. {EXIT_CODES}",
            allow_abbrev=False,
        )
        own.set_defaults(run=run, parser=own)
        if study:
            own.add_argument("study", metavar="STUDY", help=study)
        own.add_argument(
            "--workdir", default="", metavar="DIR", help="where studies are kept (default: the config's)"
        )
        own.add_argument("--json", action="store_true", help="print JSON")
        return own

    def arms(own: Any) -> Any:
        own.add_argument("--arm", action="append", default=[], metavar="ARM", help="this arm; again for more")
        return own

    def runs(own: Any) -> Any:
        arms(own).add_argument("--seeds", type=_seeds, default=(), metavar="0,1,2", help="these seeds")
        return own

    def group(own: Any) -> Any:
        own.add_argument("--group", default="", help="the arms of this group (default: all)")
        return own

    def table(own: Any, out: str) -> Any:
        add = own.add_argument
        add("study", metavar="STUDY", nargs="?", default="", help=STUDY_ANY)
        add("--out", default="", help=f"where to write (default: {out})")
        add("--from-csv", default="", metavar="FILE", help="a table arm,seed,<factors>,<responses>")
        add(
            "--direction",
            action="append",
            default=[],
            metavar="RESPONSE=min|max",
            help="of a table's response",
        )
        add("--factors", default="", metavar="A,B", help="a table's factor columns (default: found)")
        add("--log", default="", metavar="A,B", help="a table's responses of which ratios count")
        add("--ignore", default="", metavar="A,B", help="a table's columns to leave out")
        add("--baseline", default="", metavar="ARM", help="a table's baseline (default: 'baseline')")
        return own

    add = arms(
        group(verb("check", _check, "check that every arm changes what it says and nothing else", STUDY_FILE))
    ).add_argument
    add("--verbose", action="store_true", help="every check with its reason, not only what failed")
    add("--jobs", type=int, default=2, help="arms compiled at a time (default 2)")
    add("--static", action="store_true", help="leave out every check that computes")
    add("--execute", action="store_true", help="compute however large the model is")

    what = "list every rule of one config, and whether it holds here"
    add = verb("validate", _validate, what, "config file and its argument, as of --config").add_argument
    add("--static", action="store_true", help="leave out what depends on this machine")

    planning.plan_arguments(
        runs(group(verb("plan", _plan, "say what a study will take before it is launched", STUDY_FILE)))
    )
    running.run_arguments(
        runs(group(verb("run", _run, "run a study here, or what is left of it", STUDY_FILE)))
    )
    slurm.submit_arguments(
        runs(group(verb("submit", _submit, "submit a study to SLURM, or what is left of it", STUDY_FILE)))
    )
    what = "show the state of every arm, what failed and why, what is left"
    what_for = (
        "and what the time was spent on: training, steps done twice, starts (reads all of every run's rows)"
    )
    arms(verb("status", _status, what)).add_argument("--goodput", action="store_true", help=what_for)
    runs(verb("retry", _retry, "let failed runs be run again"))
    runs(verb("cancel", _cancel, "cancel what has not ended"))

    table(
        verb("report", _report, "write effects, verdicts, figures, tables and the page", ""), "<study>/report"
    )
    add = table(verb("export", _export, "write the results as one table", ""), "STUDY.FORMAT").add_argument
    add("--format", choices=("csv", "json", "parquet", "rliable"), default="csv")

    add = verb("leaderboard", _leaderboard, "rank the arms of several studies", "").add_argument
    add("studies", metavar="STUDY", nargs="+", help=STUDY_ANY)
    add("--out", default="leaderboard", metavar="DIR", help="folder of leaderboard.csv, .md and .html")
    add("--response", default="", help="rank by this response (default: the first)")
    add("--tags", default="", metavar="A,B", help="of the rows that are added")
    add("--notes", default="", help="of the rows that are added")

    add = verb(
        "promote", _promote, "make an arm's config a named production config, if its gates hold"
    ).add_argument
    add("--arm", required=True, metavar="ARM")
    add("--name", default="", help="of the production config (default: STUDY_ARM)")
    add("--production-dir", default="production", metavar="DIR")
    add("--gate", action="append", default=[], metavar="HYPOTHESIS", help="must be supported")
    add("--threshold", action="append", default=[], metavar="RESPONSE=VALUE", help="must be reached")
    add("--dry-run", action="store_true", help="print what would be written; write nothing")
    what = "add the study's arms to the leaderboard in this folder, this one as promoted"
    add("--update-leaderboard", nargs="?", const="leaderboard", default="", metavar="DIR", help=what)

    about = "print text that the finished runs of a study write, arms side by side"
    sampling.sample_arguments(runs(verb("sample", _sample, about)))

    what = "measure the training steps of a study, or the kernels"
    bench = all_verbs.add_parser("bench", help=what, description=f"{what.capitalize()}.", allow_abbrev=False)
    benches = bench.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    verbs.step_arguments(
        arms(
            group(
                verb(
                    "step",
                    _bench_step,
                    "time the training step of every arm beside the baseline's, in turns",
                    STUDY_FILE,
                    benches,
                )
            )
        )
    )
    about = "check every kernel against the reference, and time those that are right"
    verbs.kernels_arguments(verb("kernels", _bench_kernels, about, "", benches))

    about = "time what a study's document says is faster, each beside what it replaces"
    verbs.speedups_arguments(verb("speedups", _bench_speedups, about, STUDY_FILE, benches))

    what = "prepare data for the studies that take files of it"
    data = all_verbs.add_parser("data", help=what, description=f"{what.capitalize()}.", allow_abbrev=False)
    datas = data.add_subparsers(title="preparations", metavar="WHAT", required=True)
    about = "turn text into a file of token ids, going on where a killed command stopped"
    text.tokenize_arguments(verb("tokenize", _data_tokenize, about, "", datas))
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': write seeds as 0,1,2") from None


if __name__ == "__main__":
    sys.exit(main())
