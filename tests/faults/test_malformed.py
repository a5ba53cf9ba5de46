"""Row 14: malformed configs, studies, manifests and data. One line and exit 2, no traceback, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, config, main
from jaxablate.errors import UserError
from jaxablate.studies.ctclip.config import ClipData
from jaxablate.studies.ctclip.data import open_dataset
from jaxablate.studies.ctclip.data.phantom_set import write_nifti
from jaxablate.studies.ctclip.data.preprocess import Chain
from tests.faults.harness import REPO, Counts, snapshot
from tests.frozen import freeze, toy_study, write_run

TOY = "tests/configs/toy.py"
STUDY = "tests/configs/toy_study.py"
ODD = ("", " ", "nan", "-inf", "1e400", "-1", "0", "0.5", "9" * 40, "0x1F", "1_0", "None", "True", "[]", "()", "(1,",
       "{}", "{'a': 1}", "'", '"', "\\", "\x00", "\n", "\N{SNOWMAN}", "x" * 5000, "../..", "/", "a b", "1,2", "1,1",
       "0,", "cosin", "lambda: 1", "__import__('os')", "${HOME}", "%s", "tests.toy:ToyTask", "=", "--x")  # fmt: skip
PIECES = (b"", b"\x00", b"\xff\xfe", b"{", b"}", b"[", b'"', b",", b"null", b"-1", b"1e999", b"NaN", b"true", b"\n",
          b"\r", b"\\u0000", b"../", b'"\xc3\x28"', b"[" * 2000, b"9" * 500)  # fmt: skip


def mangled(content: bytes, rng: random.Random) -> bytes:
    """`content` with a few pieces cut out, put in, doubled or exchanged."""
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 1, 1, 3, 20, 200)))
        piece = rng.choice((rng.choice(PIECES), content[start:end] * 2, bytes([rng.randrange(256)])))
        content = content[:start] + piece + content[end:]
    return content


def judge(counts: Counts, call: Callable[[Sequence[str]], int], argv: Sequence[str], what: object) -> int:
    """Runs a command in this process; what it says when it refuses must be one line."""
    out, err = io.StringIO(), io.StringIO()
    counts.faults += 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python about the code in a mangled config
        try:
            code = call(argv)
        except SystemExit as exit:  # of argparse
            code = exit.code if isinstance(exit.code, int) else 70
        except Exception as error:  # which is what must not be
            counts.expect("no traceback", False, (what, argv, repr(error)[:300]))
            return 70
    lines = [line for line in err.getvalue().splitlines() if line.startswith(("error: ", "usage: "))]
    whole = code != 2 or len(lines) == 1
    counts.expect(
        "accepted" if code == 0 else "refused", code in (0, 2), (what, argv, code, err.getvalue()[-500:])
    )
    counts.expect("in one line", whole, (what, argv, err.getvalue()[-500:]))
    counts.expect("no traceback", "Traceback" not in err.getvalue(), (what, argv, err.getvalue()[-1500:]))
    return code


def overrides(times: int, seed: int) -> Counts:
    """Gives random fields of the config random values on the command line."""
    rng, counts = random.Random(seed), Counts(14, "odd values of config fields", "overrides")
    cohort = config.load(str(REPO / TOY), [])
    names = [*_leaves(cohort.base.to_dict()), "seeds", "no.such", "", "model", "host.mesh"]
    for _ in range(times):
        name, value = rng.choice(names), rng.choice(ODD)
        given = rng.choice(([f"--config.{name}={value}"], [f"--config.{name}", value]))
        judge(counts, main.main, [f"--config={REPO / TOY}", *given, "--print-config"], "override")
    return counts


def _leaves(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return [prefix.rstrip(".")]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def files(scratch: Path, times: int, seed: int) -> Counts:
    """Mangles config files and study files."""
    rng, counts = random.Random(seed), Counts(14, "mangled config and study files", "files")
    for number in range(times):
        name = rng.choice((TOY, STUDY))
        path, workdir = scratch / f"mangled{number}.py", scratch / "workdir"
        path.write_bytes(mangled((REPO / name).read_bytes(), rng))
        if name == TOY:
            judge(counts, main.main, [f"--config={path}", "--print-config"], path.read_bytes()[:2000])
        else:
            judge(
                counts,
                cli.main,
                ["run", str(path), "--dry-run", f"--workdir={workdir}"],
                path.read_bytes()[:2000],
            )
        path.unlink()
        counts.expect("nothing half-written", not workdir.exists(), name)
    return counts


VERBS = (("status",), ("cancel", "--arm=wide"), ("retry",), ("export", "--format=csv"))


def frozen_studies(scratch: Path, times: int, seed: int) -> Counts:
    """Mangles a file of a study that was run, and asks for its status, to cancel, to retry, to export."""
    rng, counts = random.Random(seed), Counts(14, "mangled manifests and run directories", "files")
    source = scratch / "source"
    manifest = freeze(toy_study(source))
    for run in manifest.runs:
        state = "bug" if (run.arm, run.seed) == ("wide", 1) else "done"
        write_run(manifest, run, state, {"val/loss": 0.5 + run.seed, "val/score": 0.1 * run.seed})
    for number in range(times):
        workdir = Path(shutil.copytree(source, scratch / str(number)))
        about_study = rng.random() < 0.5
        names = ("study.json", "runs.jsonl") if about_study else ("attempts.jsonl", "config.json", "metrics.jsonl",
                                                                  "summary.json", "provenance.json")  # fmt: skip
        path = rng.choice(sorted(p for name in names for p in workdir.rglob(name)))
        path.write_bytes(mangled(path.read_bytes(), rng))
        verb, *options = rng.choice(VERBS)
        if verb == "export":
            options = [*options, f"--out={scratch / 'out.csv'}"]
        before = snapshot(workdir)
        code = judge(
            counts, cli.main, [verb, str(workdir / "toy"), *options], (path.name, path.read_bytes()[-300:])
        )
        if code == 2 and verb in ("status", "export"):
            counts.expect("nothing half-written", snapshot(workdir) == before, path)
        shutil.rmtree(workdir)
    return counts


def data_files(scratch: Path, times: int, seed: int) -> Counts:
    """Mangles volumes and tables of a data set of NIfTI files."""
    rng, counts = random.Random(seed), Counts(14, "mangled data files", "files")
    volume, spacing = (8, 16, 16), (3.0, 6.0, 6.0)
    chain = Chain(volume, spacing, "before_resampling")
    for split in ("train", "val"):
        write_nifti(scratch / "source" / split, 0, split, 2, chain)
    for number in range(times):
        root = Path(shutil.copytree(scratch / "source", scratch / str(number)))
        path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
        path.write_bytes(mangled(path.read_bytes(), rng))
        data = ClipData("nifti", str(root / "train"), str(root / "val"), volume, spacing, tokenizer="words",
                        vocab_size=300, text_length=64)  # fmt: skip
        counts.faults += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nibabel about odd headers
            try:
                open_dataset(data, scratch / f"cache{number}", workers=1)
                counts.expect("accepted", True)
            except UserError as error:
                counts.expect("refused", True)
                counts.expect("in one line", "\n" not in str(error), (path.name, str(error)))
            except Exception as error:  # which is what must not be
                counts.expect("no traceback", False, (path.name, repr(error)[:300]))
        shutil.rmtree(root)
        shutil.rmtree(scratch / f"cache{number}", ignore_errors=True)
    return counts


def test_whatever_a_file_holds_the_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    overrides(150, seed=0).check()
    for number, experiment in enumerate((files, frozen_studies, data_files)):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        counts = experiment(scratch, (60, 60, 25)[number], seed=0).check()
        assert counts.held["refused"] > 10  # they are no harmless changes


def test_a_traceback_would_be_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """The control of `judge`."""

    def broken(argv: Sequence[str]) -> int:
        raise KeyError(argv[0])

    counts = Counts(14, "control", "calls")
    judge(counts, broken, ["x"], "control")
    judge(counts, lambda argv: 1, ["x"], "control")
    assert len(counts.wrong) == 2
