#!/usr/bin/env bash
# The library notebooks from top to bottom, then the tests between rooms. Experiments run in `make smoke`.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1                          # two notebooks at a time on two cores
echo "== notebooks"
nbdev_test --path nbs --skip_folder_re '^(experiments|[_.])' --n_workers 2 --timing
echo "== tests"
pytest
