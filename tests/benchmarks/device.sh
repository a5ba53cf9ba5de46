#!/usr/bin/env bash
# The benchmarks on a machine with a GPU, in one command: of the kernels, of the language model, of the Burgers operators.
#
#     tests/benchmarks/device.sh FOLDER [of `jaxablate bench kernels`] [-- of language_model.py] [-- of burgers.py]
#     tests/benchmarks/device.sh "$OUT" --ops=attention --cases='ctclip_*,tinystories*' --seconds=4 --tune
#     tests/benchmarks/device.sh "$OUT" --seconds=4 -- --precision=bfloat16 --torch=compile,max-autotune
#     tests/benchmarks/device.sh "$OUT" -- --cohort=16          # nothing before the --: the language model alone
#     tests/benchmarks/device.sh "$OUT" -- -- --cohorts=1,4     # the Burgers operators alone
#
# The last one named runs in any case, those before it if they have arguments. Needs python3 with jax, numpy, jaxtyping
# and matplotlib, the models also flax, optax, scipy, tokenizers and ml-collections; no network, no installation.
# Writes kernels.json, kernels.md, kernels.png and, with --tune, tuned/<device>.json to FOLDER, after every case anew,
# language_model.json after every precision and burgers.json after every operator, so that an interrupted run leaves
# what it had. COMMIT names the code where git does not know it.
set -euo pipefail
folder=$(mkdir -p "${1:?"give the folder for the results"}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# PyTorch, where it is installed, competes in the same process and needs memory of its own.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.7}"
export JAXABLATE_TUNED="${JAXABLATE_TUNED:-$folder/tuned}"
commit="${COMMIT:-$(git rev-parse HEAD 2>/dev/null || true)}"

names=(kernels language_model burgers) last=0
of_kernels=() of_language_model=() of_burgers=()
for argument; do
  declare -n own="of_${names[last]}"
  if [[ $argument != -- ]]; then
    own+=("$argument")
  elif ((++last == ${#names[@]})); then
    echo "device.sh: there is nothing behind a third --" >&2
    exit 2
  fi
done
wanted() { # whether to run the part of this number
  declare -n own="of_${names[$1]}"
  (($1 == last || ${#own[@]} > 0))
}

status=0
if wanted 0; then
  python3 -m jaxablate.cli bench kernels --out="$folder/kernels.json" --commit="$commit" "${of_kernels[@]}" || status=$?
fi
for part in 1 2; do # also after one that failed; with the tiles that were tuned
  wanted $part || continue
  declare -n own="of_${names[part]}"
  python3 -m "tests.benchmarks.${names[part]}" --out="$folder/${names[part]}.json" --commit="${COMMIT:-}" "${own[@]}" || status=$?
done
exit $status
