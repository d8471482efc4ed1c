#!/usr/bin/env bash
# Makes the environment (.venv, once) and hands over to the runner. ./run_all.sh --help tells the rest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lock=$root/requirements.lock stamp=$root/.venv/lock.sha256 python=$root/.venv/bin/python

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "run_all.sh: Python 3.11, 3.12 or 3.13 is needed, but none was found on PATH. Install it and run this again." >&2
  return 1
}

# PyPI's torch for Linux carries 2 GB of CUDA: without an NVIDIA GPU the CPU build does, where its index can be reached.
torch_index() {
  local url=https://download.pytorch.org/whl/cpu
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null &&
    "$python" -c "import urllib.request as r; r.urlopen('$url/torch/', timeout=5)" 2>/dev/null; then
    echo "--extra-index-url=$url"
  fi
}

make_environment() {
  local base index
  base=$(find_python)
  echo "Making the environment .venv from requirements.lock (once; some minutes) ..." >&2
  if ! "$base" -m venv "$root/.venv"; then
    echo "run_all.sh: $base cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
    return 1
  fi
  index=$(torch_index)
  if ! "$python" -m pip install -qq --disable-pip-version-check ${index:+"$index"} -r "$lock"; then
    echo "run_all.sh: the installation failed (see above). Mend the cause, then run this again; it goes on." >&2
    return 1
  fi
  digest >"$stamp"
}

digest() { "$python" -c "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())" "$lock"; }

if [ ! -x "$python" ] || [ ! -f "$stamp" ] || [ "$(digest)" != "$(cat "$stamp")" ]; then
  make_environment
fi
# threads that spin at barriers starve each other as soon as another program takes a core: waiting costs next to nothing
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m helpers.suite "$@"
