#!/usr/bin/env python3
"""The stage `code`: what the code of every experiment notebook is, artifacts/code/NOTEBOOK.json: each module of `mmqlora` that it reaches, and its md5.

A stage depends on the file of its notebook: that changes when, and only when, one of these modules does. So dvc.yaml lists no modules,
dvc.lock does not list fifty for every run, and whoever asks why a run is stale sees which module it was (`diff` with the cached file)."""
import ast
import json
import re
import sys
from functools import cache
from hashlib import md5
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_cells(path):
    "(source, cell) of each code cell."
    return [("".join(c["source"]), c) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def imported(source):
    "mmqlora modules that a source imports anywhere; `import mmqlora` counts as `__init__`."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level: found.add(module.split(".")[0])
            elif module.split(".")[0] == "mmqlora": found.add((module.split(".") + ["__init__"])[1])
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".") + ["__init__"])[1] for alias in node.names if alias.name.split(".")[0] == "mmqlora"}
    return found


@cache
def imported_by(module): return imported((ROOT/f"mmqlora/{module}.py").read_text())


def closure(modules):
    "All modules reached from `modules`, themselves included."
    seen, todo = set(), list(modules)
    while todo:
        module = todo.pop()
        if module in seen: continue
        seen.add(module)
        todo += imported_by(module)
    return seen


def reached(notebook):
    "Modules that a notebook reaches; its lines of magic are not Python."
    return closure(set().union(*(imported(re.sub(r"^%.*$", "", source, flags=re.M)) for source, _ in code_cells(notebook))))


def main(out="artifacts/code"):
    out = ROOT/out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"): old.unlink()                          # of notebooks that are no more
    for notebook in sorted((ROOT/"nbs/experiments").glob("*.ipynb")):
        code = {module: md5((ROOT/f"mmqlora/{module}.py").read_bytes()).hexdigest() for module in sorted(reached(notebook))}
        (out/f"{notebook.stem}.json").write_text(json.dumps(code, indent=1) + "\n")


if __name__ == "__main__": sys.exit(main())
