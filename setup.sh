#!/usr/bin/env bash
# Creates .venv and installs microtron in it, once. setup.sh dev adds what the tests need.
# run_train.sh and tests/run.sh call it; it returns at once when there is nothing to do.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${MICROTRON_VENV:-$here/.venv}
extra=${1:-}
want=$(cat "$here/pyproject.toml" "$here/setup.sh" | cksum)
stamp=$venv/.installed${extra:+-$extra}
if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
  exit 0
fi

python=${PYTHON:-}
for candidate in $python python3 python3.12 python3.11 python3.13; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
  python=
done
if [[ -z $python ]]; then
  echo "error: microtron needs Python 3.11 or newer; install one or name it: PYTHON=/path/to/python $0" >&2
  exit 1
fi
has_torch='import importlib.metadata as m; v = m.version("torch").split(".")[:2]; raise SystemExit(not (2, 11) <= (int(v[0]), int(v[1])) < (2, 14))'
if [[ ! -x $venv/bin/python ]]; then
  system=() # a fitting torch that the machine came with (its GPU's build) is used, not replaced
  "$python" -c "$has_torch" 2>/dev/null && system=(--system-site-packages)
  "$python" -m venv "${system[@]}" "$venv" || { echo "error: '$python -m venv' failed; is the venv package installed?" >&2; exit 1; }
fi

echo "setting up $venv (once, a minute or two) ..."
log=$venv/setup.log
: >"$log"
install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    echo "error: pip install $* failed (full log: $log)" >&2
    exit 1
  }
}
if ! "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
  install torch==2.13.0 # the version most tested; any torch >=2.11,<2.14 already there is kept
fi
install -e "$here${extra:+[$extra]}"
if [[ -n $extra ]]; then
  # OpenAI's reference model, a second judge for the tests; it pins another Python and CUDA kernels,
  # so it comes alone, and where it cannot be had its tests skip.
  "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
    --no-deps --ignore-requires-python gpt-oss==0.0.9 >>"$log" 2>&1 || true
  echo "$want" >"$venv/.installed" # the extra includes the base
fi
echo "$want" >"$stamp"
