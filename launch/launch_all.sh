#!/usr/bin/env bash
# A study, or one of its groups, with one word:
#
#   launch/launch_all.sh GROUP [--study=FILE] [options of jaxablate submit]
#   launch/launch_all.sh all --study=configs/tinystories.py --site=launch/sites/two_gpus.toml
#   launch/launch_all.sh ablation --array-limit=4
#   launch/launch_all.sh all --dry-run
#
# GROUP is a group of the study, and `all` is one of every study; a wrong one is answered with the right ones.
# Rates that are to be tuned are tuned first, and the confirmations follow by themselves.
# Where there is no sbatch it trains here, with `jaxablate run` and that verb's options.
#   --study=FILE       study file with its argument (default: $JAXABLATE_STUDY, or configs/ctclip.py)
#   JAXABLATE_PYTHON   the interpreter (default: python3)
set -euo pipefail

case "${1-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
    exit 0
    ;;
  '' | -*)
    echo "error: '${1-}': give a group of the study first, such as all; see $0 --help" >&2
    exit 2
    ;;
esac
group=$1
shift

here=$(cd -- "$(dirname -- "$0")" && pwd)
study=${JAXABLATE_STUDY:-$here/../configs/ctclip.py}
for word; do # every word moves to the end, but for --study
  shift
  case "$word" in
    --study=*) study=${word#--study=} ;;
    --study)
      echo "error: --study: write it as --study=FILE" >&2
      exit 2
      ;;
    *) set -- "$@" "$word" ;;
  esac
done

verb=submit
if ! command -v sbatch >/dev/null; then
  verb=run
  echo "no sbatch here: training on this machine" >&2
fi
exec "${JAXABLATE_PYTHON:-python3}" -m jaxablate.cli "$verb" "$study" --group="$group" "$@"
