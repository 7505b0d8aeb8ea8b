#!/usr/bin/env bash
# README.md from nbs/index.ipynb: executed, so that its table is that of the committed results and its code runs.
set -euo pipefail
cd "$(dirname "$0")/.."
jupyter nbconvert --log-level WARN --execute --inplace nbs/index.ipynb
nbdev_clean --fname nbs/index.ipynb
jupyter nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb \
  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide_input \
  --TagRemovePreprocessor.remove_cell_tags=remove_cell --TagRemovePreprocessor.remove_all_outputs_tags=remove_output |
  sed 's#](\.\./#](#g' | cat -s > README.new
mv README.new README.md
