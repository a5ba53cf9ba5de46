#!/usr/bin/env bash
# The CT-CLIP study, or one of its groups, with one word:
#
#   launch/launch_all.sh {all|baseline|optimized|ablation} [options of jaxablate submit]
#   launch/launch_all.sh ablation --site=launch/sites/two_gpus.toml --array-limit=4
#   launch/launch_all.sh all --dry-run
#
# Where there is no sbatch it trains here, with `jaxablate run` and that verb's options.
#   JAXABLATE_STUDY    another study file, with its argument (default: configs/ctclip.py)
#   JAXABLATE_PYTHON   the interpreter (default: python3)
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
}

case "${1-}" in
  all | baseline | optimized | ablation) group=$1 ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    echo "error: '${1-}': give one of all, baseline, optimized, ablation" >&2
    exit 2
    ;;
esac
shift

here=$(cd -- "$(dirname -- "$0")" && pwd)
study=${JAXABLATE_STUDY:-$here/../configs/ctclip.py}
verb=submit
if ! command -v sbatch >/dev/null; then
  verb=run
  echo "no sbatch here: training on this machine" >&2
fi
exec "${JAXABLATE_PYTHON:-python3}" -m jaxablate.cli "$verb" "$study" --group="$group" "$@"
