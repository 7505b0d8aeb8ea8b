#!/usr/bin/env bash
# The corpus, checked against data.dvc, then whatever of the pipeline is not up to date, to paper/main.pdf.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== corpus"
mmqlora corpus
dvc status -q data.dvc || { echo "mmqlora: data/ differs from data.dvc. \`mmqlora corpus --force\` renders it again; if you changed the corpus on purpose, \`dvc add data\`" >&2; exit 1; }
dvc commit -q -f data.dvc                        # fills the local cache; data.dvc stays as it is
echo "== pipeline"
dvc repro
echo "== done: paper/main.pdf, results/, paper/generated/"
