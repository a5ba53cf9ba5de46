"""XLA's own word on the Pallas kernels: compile them for GPUs on a machine that has none.

    JAX_PLATFORMS=cpu PYTHONPATH=.:kernels python tests/kernels/deviceless.py h200 a100 --json=report.json

needs jax's CUDA plugin (the extra `cuda`), and no GPU.  Each case is compiled forward and backward; the
spills of registers are those that XLA's log tells of, and a kernel that wants too much shared memory XLA
refuses.  Prints a line per case and target, and exits with 1 if a program was refused or one of our
kernels spills.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # before jax: XLA tells of spills at the level of information

import cuda_problems
import jax
from cuda_problems import Problem
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxablate.targets import TARGETS, find, target_mesh

_SPILL = re.compile(r"spilled to local memory in function '(\w+)', (\d+) bytes spill stores")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What XLA made of a problem.

    Attributes:
        target, op, case: of what.
        refused: why, in XLA's words; None if it compiled.
        kernels: the Pallas kernels in the compiled program.
        spills: kernel, ours or one of XLA's, and the bytes per thread that it spills.
        argument_bytes, output_bytes, temporary_bytes: memory that the program takes.
        seconds: of compilation.
    """

    target: str
    op: str
    case: str
    refused: str | None
    kernels: tuple[str, ...]
    spills: dict[str, int]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    seconds: float

    @property
    def ours(self) -> dict[str, int]:
        """The spills of Pallas kernels."""
        return {name: size for name, size in self.spills.items() if name in self.kernels}


def compile_for(problem: Problem, mesh: Mesh, target: str) -> Outcome:
    """Compile forward and backward of a problem for one device of the mesh."""
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        (problem.arrays, problem.constants),
    )
    start = time.perf_counter()
    with warnings.catch_warnings(), jax.set_mesh(mesh):
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        lowered = jax.jit(problem.program(find(target).kind)).lower(*arguments)
    try:
        with _log() as log:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        return Outcome(target, problem.op, problem.case, str(error), (), {}, 0, 0, 0, seconds)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Outcome(
        target,
        problem.op,
        problem.case,
        refused=None,
        kernels=_kernels(compiled.as_text()),
        spills={name: int(size) for name, size in _SPILL.findall("".join(log))},
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        seconds=seconds,
    )


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
    """What C++ writes to standard error inside the block; there when the block is over."""
    text: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.append(file.read())


def _kernels(text: str) -> tuple[str, ...]:
    """The names of the Triton custom calls in a compiled program, in its order."""
    calls = (line for line in text.splitlines() if 'custom_call_target="__gpu$xla.gpu.triton"' in line)
    return tuple(call.rpartition(' name = "')[2].partition('"')[0] for call in calls)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--group", default="PAPER", help="PAPER, SMALL or CASES, as in the cases' modules")
    parser.add_argument("--dtype", default="bfloat16", help="instead of the cases' own; 'own' for that")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    arguments = parser.parse_args()

    dtype = None if arguments.dtype == "own" else arguments.dtype
    outcomes = []
    for target in arguments.targets:
        mesh = target_mesh(target)
        for op in cuda_problems.operations():
            for problem in cuda_problems.problems(op, arguments.group, dtype):
                outcome = compile_for(problem, mesh, target)
                outcomes.append(outcome)
                print(f"{target}  {problem.id:40}  {_line(outcome)}", flush=True)
    if arguments.json:
        versions = {name: version(name) for name in ("jax", "jaxlib")}
        report = {"versions": versions, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    bad = sum(outcome.refused is not None or bool(outcome.ours) for outcome in outcomes)
    print(f"{len(outcomes)} programs, {bad} refused or with spills")
    return 1 if bad else 0


def _line(outcome: Outcome) -> str:
    if outcome.refused is not None:
        return outcome.refused
    spills = "".join(f"  {name} spills {size} bytes" for name, size in outcome.ours.items())
    return f"{outcome.temporary_bytes / 2**20:8.2f} MiB  {' '.join(outcome.kernels)}{spills}"


if __name__ == "__main__":
    sys.exit(main())
