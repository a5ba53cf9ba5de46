"""How fast `jaxablate data tokenize` is, in how much memory, on how many cores.

    python tests/benchmarks/tokenize_speed.py [--megabytes=200] [--vocab-size=10000] [--folder=DIR]

Makes a text of invented words, as frequent as 1/rank, in sentences, paragraphs and documents; then runs the
command in a process of its own and prints one JSON object. `cores_used` is processor time over wall time, of
training and encoding together. The peak is the process's own: it starts no others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS, AT_ONCE = 100_000, 500_000
SYLLABLES = [c + v for c in ("br", "ch", "gr", "sh", "st", "th", "tr", *"bcdfghjklmnprstvw") for v in "aeiou"]
ENDINGS = (
    [" "] * 40 + [", "] * 4 + [". "] * 5 + ['." "', "? ", "! ", ".\n\n", " 17 ", "é ", "\n<|endoftext|>\n"]
)


def make(path: Path, size: int) -> None:
    """Writes at least `size` bytes of text to `path`."""
    chance = np.random.default_rng(0)
    lengths = 1 + chance.poisson(1.3, WORDS)
    syllables = chance.integers(len(SYLLABLES), size=lengths.sum())
    parts = np.split(syllables, np.cumsum(lengths)[:-1])
    words = ["".join(SYLLABLES[i] for i in part) for part in parts]
    chances = 1 / np.arange(1, WORDS + 1)
    chances /= chances.sum()
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            chosen = chance.choice(WORDS, AT_ONCE, p=chances)
            ends = chance.integers(len(ENDINGS), size=AT_ONCE)
            file.write("".join(words[i] + ENDINGS[j] for i, j in zip(chosen, ends, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument(
        "--folder", default=None, help="for the text and the ids (default: the system's for such)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        text, report = Path(name) / "text.txt", Path(name) / "report.json"
        make(text, args.megabytes * 10**6)
        command = [sys.executable, "-m", "jaxablate.cli", "data", "tokenize", str(text), "--json"]
        command += [f"--out={name}/tokens.npy", f"--vocab-size={args.vocab_size}"]
        load, began = os.getloadavg()[0], time.perf_counter()
        with report.open("w") as out:
            process = subprocess.Popen(command, stdout=out)
            _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(process.returncode)
        found = json.loads(report.read_text())
        result = {
            "text_megabytes": text.stat().st_size / 1e6,
            "seconds": seconds,
            "training_seconds": found["training_seconds"],
            "training_megabytes_per_second": text.stat().st_size / 1e6 / found["training_seconds"],
            "encoding_megabytes_per_second": found["megabytes_per_second"],
            "peak_megabytes": used.ru_maxrss * 1024 / 1e6,
            "processor_seconds": used.ru_utime + used.ru_stime,
            "cores_used": (used.ru_utime + used.ru_stime) / seconds,
            "cores": os.cpu_count(),
            "load_before": load,
            "tokens": found["tokens"],
            "characters_per_token": found["characters_per_token"],
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
