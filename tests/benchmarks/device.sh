#!/usr/bin/env bash
# The benchmarks on a machine with a GPU, in one command: of the kernels, and behind `--` of the language model.
#
#     tests/benchmarks/device.sh FOLDER [arguments of `jaxablate bench kernels`] [-- arguments of language_model.py]
#     tests/benchmarks/device.sh "$OUT" --ops=attention --cases='ctclip_*,tinystories*' --seconds=4 --tune
#     tests/benchmarks/device.sh "$OUT" --seconds=4 -- --precision=bfloat16 --torch=compile,max-autotune
#     tests/benchmarks/device.sh "$OUT" -- --cohort=16          # nothing before the --: the language model alone
#
# Needs python3 with jax, numpy, jaxtyping and matplotlib, the language model also flax, optax, scipy, tokenizers
# and ml-collections; no network, no installation. Writes kernels.json, kernels.md, kernels.png and, with --tune,
# tuned/<device>.json to FOLDER, after every case anew, and language_model.json after every precision, so that an
# interrupted run leaves what it had. COMMIT names the code where git does not know it.
set -euo pipefail
folder=$(mkdir -p "${1:?"give the folder for the results"}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# PyTorch, where it is installed, competes in the same process and needs memory of its own.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.7}"
export JAXABLATE_TUNED="${JAXABLATE_TUNED:-$folder/tuned}"
commit="${COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}"

parts=kernels of_kernels=()
while (($#)); do
  if [[ $1 == -- ]]; then
    ((${#of_kernels[@]})) && parts="kernels language_model" || parts=language_model
    shift
    break
  fi
  of_kernels+=("$1")
  shift
done

status=0
if [[ $parts == *kernels* ]]; then
  python3 -m jaxablate.cli bench kernels --out="$folder/kernels.json" --commit="$commit" "${of_kernels[@]}" || status=$?
fi
if [[ $parts == *language_model* ]]; then # also after a kernel that failed; with the tiles that were tuned
  python3 -m tests.benchmarks.language_model --out="$folder/language_model.json" --commit="${COMMIT:-}" "$@" || status=$?
fi
exit $status
