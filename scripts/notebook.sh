#!/usr/bin/env bash
# Executes an experiment notebook: scripts/notebook.sh NOTEBOOK [papermill arguments, e.g. -p run qlora].
# The executed copy, with its outputs, is artifacts/executed/<notebook>[-<value of the last argument>].ipynb.
set -euo pipefail
notebook=$1; shift
executed=artifacts/executed/$(basename "$notebook" .ipynb)${3:+-$3}.ipynb
mkdir -p "$(dirname "$executed")"
# `-` and not /dev/stdout: opening that would empty a log that somebody writes to
exec python -m papermill "$notebook" "$executed" -k python3 --no-progress-bar --stdout-file - --stderr-file - "$@"
