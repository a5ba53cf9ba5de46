"""Time of `report` on a study of many runs: python tests/benchmarks/report.py --arms=50 --seeds=20 --rows=100

The study is made up in a temporary directory and is not part of the time. From reading the run directories to
the last file of the report; imports counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMED = """
import sys, time
from pathlib import Path
began = time.perf_counter()
def lap(what):
    global began
    print(f"{what:8} {time.perf_counter() - began:6.2f} s")
    began = time.perf_counter()
from jaxablate.analysis import results
from jaxablate.analysis.board import write_board
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.analysis.report.write import write_report
from jaxablate.manifest import Manifest
lap("imports")
found = results.load(Manifest.load(sys.argv[1]))
lap("load")
analysis = analyse(found)
lap("analyse")
files = write_report(found, analysis, Path(sys.argv[1]) / "report").files
lap("write")
write_board(found, analysis, Path(sys.argv[1]) / "report" / "tensorboard")
lap("board")
print(f"{len(found.runs)} runs, {len(files)} files, {files[0].stat().st_size / 1e6:.1f} MB of HTML")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100, help="of metrics.jsonl in each run")
    parser.add_argument("--keep", default="", help="directory in which the study and its report are kept")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from jaxablate.study import Arm, Factor
    from tests.analysis.made import made_study
    from tests.analysis.made_dirs import made_study_dir

    levels = {f"v{i}": {"model.width": i} if i else {} for i in range(args.arms)}
    factor = Factor("variant", "model", levels)
    arms = tuple(
        Arm("baseline" if i == 0 else f"variant_{i}", {"variant": f"v{i}"}) for i in range(args.arms)
    )
    study = made_study(args.seeds, factors=(factor,), arms=arms, hypotheses=())
    with tempfile.TemporaryDirectory() as scratch:
        effects = {f"variant=v{i}": 0.002 * (i % 11 - 5) for i in range(1, args.arms)}
        path = made_study_dir(Path(args.keep or scratch), study, rows=args.rows, effects=effects).path
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", TIMED, str(path)], check=True, env=env)
        print(f"{'in all':8} {time.perf_counter() - began:6.2f} s")


if __name__ == "__main__":
    main()
