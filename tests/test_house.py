"The house: import law, what is exported, what notebooks may hold."
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, notebooks, rooms
from deps import closure, code_cells, imported

DATA = ("grammar", "corpus", "scenes", "questions", "render", "datasheet", "mmevents", "video", "importers", "signals", "frames", "batch", "prepare", "decoding", "tasks", "retention")
MODELS = ("model", "families", "smollm2", "temporal", "ranks", "bottleneck", "prefix", "allocate", "joint", "prune", "budget", "adapters", "lifecycle", "insight", "lean", "blocks", "lowmem", "recorded", "steps")
EXPERIMENTS = sorted((ROOT/"nbs/experiments").glob("*.ipynb"))


def test_every_module_comes_from_a_notebook():
    assert {p.stem for p in (ROOT/"mmqlora").glob("*.py")} - {"_modidx"} == set(rooms())


@pytest.mark.parametrize("room", [r for r in rooms() if r != "__init__"])
def test_a_room_imports_only_from_rooms_above_it(room):
    order = rooms()
    below = {m for m in imported((ROOT/f"mmqlora/{room}.py").read_text()) if order.index(m) >= order.index(room)}
    assert not below, f"{room} imports {below}, which come later"


def test_data_rooms_and_model_rooms_do_not_know_each_other():
    assert not {(d, m) for d in DATA for m in closure([d]) if m in MODELS}
    assert not {(m, d) for m in MODELS for d in closure([m]) if d in DATA}


@pytest.mark.parametrize("room", ["core", "config", "corpus", "metrics", "retrieval", "statistics", "errors", "scaling", "figures", "report", "cli", "__init__"])
def test_rooms_that_only_read_results_import_no_torch(room):
    module = "mmqlora" if room == "__init__" else f"mmqlora.{room}"
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'IPython', 'jupyter_core', 'nbdev') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of notebooks and modules in which nbdev may write."
    root = tmp_path_factory.mktemp("house")
    for name in ("nbs", "mmqlora"): shutil.copytree(ROOT/name, root/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "params.yaml"): shutil.copy(ROOT/name, root)
    return root


def contents(root, folder, pattern): return {p.relative_to(root): p.read_text() for p in (root/folder).rglob(pattern)}


def nbdev(command, root): subprocess.run([shutil.which(command) or f"{sys.prefix}/bin/{command}"], cwd=root, check=True, capture_output=True)


def test_nbdev_export_leaves_no_diff(copy):
    before = contents(copy, "mmqlora", "*.py")
    nbdev("nbdev_export", copy)
    changed = [str(p) for p, text in contents(copy, "mmqlora", "*.py").items() if before.get(p) != text]
    assert not changed, f"run nbdev_export: {changed}"


def test_nbdev_clean_leaves_no_diff_and_keeps_the_parameters_tag(copy):
    before = contents(copy, "nbs", "*.ipynb")
    nbdev("nbdev_clean", copy)
    after = contents(copy, "nbs", "*.ipynb")
    assert not [str(p) for p, text in after.items() if before[p] != text], "run nbdev_clean"
    assert all('"parameters"' in text for p, text in after.items() if "experiments" in p.parts)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_has_parameters_no_outputs_and_no_long_function(path):
    cells = code_cells(path)
    assert sum("parameters" in c["metadata"].get("tags", []) for _, c in cells) == 1
    assert not any(c["outputs"] or c["execution_count"] for _, c in cells)
    assert not any(re.search(r"^def .*\n(?:[ ]+.*\n){4}", s + "\n", re.M) for s, _ in cells)


@pytest.mark.parametrize("path", [p for p in notebooks() if p.stem != "index"], ids=lambda p: p.stem)
def test_a_room_asserts_something_and_its_export_cells_are_short(path):
    cells = [s for s, _ in code_cells(path)]
    exported = [s for s in cells if re.search(r"^#\| export", s, re.M)]
    assert all(len([line for line in s.splitlines() if line.strip()]) <= 30 for s in exported)
    assert any(re.search(r"\bassert\b|\btest_(eq|ne|close|fail)\(", s) for s in cells)


@pytest.mark.parametrize("path", sorted((ROOT/"mmqlora").glob("*.py")), ids=lambda p: p.stem)
def test_nothing_unsafe_is_called(path):
    unsafe = r"trust_remote_code\s*=\s*True|\bpickle\b|torch\.load\(|shell\s*=\s*True|os\.system|\beval\(|\bexec\("
    assert not re.search(unsafe, re.sub(r"\.eval\(\)", "", path.read_text()))
