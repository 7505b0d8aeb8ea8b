#!/usr/bin/env bash
# Creates .venv with the pinned dependencies of requirements.txt, or leaves it alone when it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "mmqlora: $1" >&2; exit 1; }

NEED_GB=${NEED_GB:-10}       # .venv takes 7 GB (torch's wheel carries CUDA), pip's downloads the rest while it works
stamp=.venv/.lock
wanted=$(cat requirements.txt settings.ini | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || fail "no Python found: install python3.11 and python3.11-venv, or set PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
  fail "$("$python" --version) at $python is not supported: Python 3.11 (to 3.13) is needed; set PYTHON=/path/to/python3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module: apt-get install python3-venv"
free_gb=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ -d .venv ] || [ "$free_gb" -ge "$NEED_GB" ] || fail "$free_gb GB free in $PWD, $NEED_GB GB needed for .venv"

echo "== environment: .venv from requirements.txt ($("$python" --version)); some minutes the first time"
[ -x .venv/bin/python ] || "$python" -m venv .venv
# the lock is complete; --no-deps keeps out opencv-python, which needs a screen's libraries where opencv-python-headless needs none
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on --no-deps -r requirements.txt
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
echo "$wanted" > "$stamp"
