#!/usr/bin/env bash
# The kernel benchmark on a machine with a GPU, in one command:
#
#     tests/benchmarks/device.sh FOLDER [arguments of `jaxablate bench kernels`]
#     tests/benchmarks/device.sh "$OUT" --ops=attention --cases='ctclip_*,tinystories*' --seconds=4 --tune
#
# Needs python3 with jax, numpy, jaxtyping and matplotlib; no network, no installation. Writes kernels.json,
# kernels.md, kernels.png and, with --tune, tuned/<device>.json to FOLDER, after every case anew, so that an
# interrupted run leaves what it had. COMMIT names the code where git does not know it.
set -euo pipefail
folder=$(mkdir -p "${1:?"give the folder for the results"}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1
# PyTorch, where it is installed, competes in the same process and needs memory of its own.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.7}"
export JAXABLATE_TUNED="${JAXABLATE_TUNED:-$folder/tuned}"
commit="${COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}"
exec python3 -m jaxablate.cli bench kernels --out="$folder/kernels.json" --commit="$commit" "$@"
