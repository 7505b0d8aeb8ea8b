#!/usr/bin/env bash
# The corpus, checked against data.dvc, then whatever of the pipeline is not up to date, to paper/main.pdf.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== corpus"
mmqlora corpus
cp data.dvc data.dvc.wanted
trap 'rm -f data.dvc.wanted' EXIT
dvc commit -q -f data.dvc                        # fills the local cache, and writes the hash of what lies in data/
if ! cmp -s data.dvc data.dvc.wanted; then
  mv data.dvc.wanted data.dvc
  echo "mmqlora: data/ is not the corpus of data.dvc. \`mmqlora corpus --force\` renders it again; if you changed it on purpose, \`dvc add data\`" >&2
  exit 1
fi
echo "== pipeline"
dvc repro frames
scripts/runs.py                                  # the matrix, all cores busy; whatever else changed follows
dvc repro
echo "== done: paper/main.pdf, results/, paper/generated/"
