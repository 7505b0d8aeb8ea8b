#!/usr/bin/env python3
"Rewrites the `mmqlora/*.py` deps of every notebook stage in dvc.yaml: exactly the modules that its notebook reaches."
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tests"))
from conftest import closure, code_cells, imported

lines, out, notebook = (ROOT/"dvc.yaml").read_text().splitlines(), [], None
for line in lines:
    if asked := re.search(r"cmd: scripts/notebook.sh (\S+)", line): notebook = ROOT/asked[1]
    if re.match(r"\s+- mmqlora/\w+\.py$", line): continue
    out.append(line)
    if notebook and re.match(r"\s+- nbs/experiments/\w+\.ipynb$", line):
        source = set().union(*(imported(re.sub(r"^%.*$", "", s, flags=re.M)) for s, _ in code_cells(notebook)))
        indent = line[:len(line) - len(line.lstrip())]
        out += [f"{indent}- mmqlora/{m}.py" for m in sorted(closure(source))]
(ROOT/"dvc.yaml").write_text("\n".join(out) + "\n")
