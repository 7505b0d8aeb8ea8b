#!/usr/bin/env bash
# The whole pipeline with the profile `smoke`, in a copy under .smoke/, so that committed results stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
begin=$(date +%s)
rm -rf .smoke && mkdir .smoke
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t .smoke --
cd .smoke
rm -rf dvc.lock data.dvc results/cpu paper/generated paper/main.pdf
sed -i 's/^profile: .*/profile: smoke/' params.yaml
python - <<'PY'
"The corpus need not be larger than the profile uses of it."
import pathlib, yaml
path = pathlib.Path("params.yaml")
params = yaml.safe_load(path.read_text())
params["corpus"]["clips"] = params["profiles"]["smoke"]["clips"]
path.write_text(yaml.safe_dump(params, sort_keys=False))
PY
export PYTHONPATH=$PWD                          # this copy of mmqlora, not the one that .venv knows
git init -q . && mmqlora corpus && dvc add -q data
dvc repro frames
# one run of each kind as its stage: most of a smoke run is the start of its notebook, so the others share a process per core
staged=(zeroshot full qlora tqlora)
scripts/runs.py "${staged[@]}"
cores=$(nproc)
python -c 'from mmqlora.config import load_params; print(*load_params().runs, sep="\n")' | grep -vxF "$(printf '%s\n' "${staged[@]}")" > artifacts/others
MMQLORA_CORES=1 xargs -a artifacts/others -P"$cores" -n $(( ($(wc -l < artifacts/others) + cores - 1) / cores )) mmqlora train
dvc commit -q -f finetune
dvc repro
pdftotext paper/main.pdf - | grep -q PENDING && { echo "mmqlora: the paper has PENDING numbers" >&2; exit 1; }
mmqlora check
dvc repro 2>&1 | grep -q "up to date" || { echo "mmqlora: a second dvc repro did work" >&2; exit 1; }
echo "== smoke: .smoke/paper/main.pdf, $(pdfinfo paper/main.pdf | awk '/Pages/ {print $2}') pages, $(( $(date +%s) - begin )) s"
