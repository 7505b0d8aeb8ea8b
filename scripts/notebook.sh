#!/usr/bin/env bash
# Executes an experiment notebook: scripts/notebook.sh NOTEBOOK [-p NAME VALUE ...], see scripts/notebook.py.
exec python "$(dirname "$0")/notebook.py" "$@"
