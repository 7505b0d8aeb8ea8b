"dvc.yaml: every stage names exactly what its notebook reaches; and one run, small, from clips to record."
import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager
from hashlib import md5

import nbformat
import pytest
import yaml
from conftest import ROOT
from deps import code_cells, reached
from dvc.repo import Repo
from ruamel.yaml import YAML

from mmqlora.batch import save_clips
from mmqlora.config import load_params, run_config
from mmqlora.core import InputError, read_json, repo_path
from mmqlora.corpus import write_records
from mmqlora.prepare import prepare
from mmqlora.report import LATER, check_record
from mmqlora.runs import run_experiment

import runs

STAGES = yaml.safe_load((ROOT/"dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT/"params.yaml").read_text())
BODY = {name: stage.get("do", stage) for name, stage in STAGES.items()}
NOTEBOOKS = [name for name, body in BODY.items() if "scripts/notebook.sh" in body["cmd"]]


def outs(body): return [next(iter(o)) if isinstance(o, dict) else o for o in body["outs"]]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stage_depends_on_its_notebook_and_on_what_the_stage_code_says_of_it(name):
    deps = set(BODY[name]["deps"])
    assert {f"nbs/experiments/{name}.ipynb", f"artifacts/code/{name}.json"} <= deps and f"nbs/experiments/{name}.ipynb" in BODY[name]["cmd"]
    assert not {d for d in deps if d.startswith("mmqlora")}
    assert {"mmqlora", "nbs/experiments"} <= set(BODY["code"]["deps"]) and outs(BODY["code"]) == ["artifacts/code"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    "A repository with our code, our stage `code` and, for every notebook, a stage that depends on code as ours does and makes a file."
    root = tmp_path_factory.mktemp("corridor")
    for part in ("mmqlora", "scripts", "nbs/experiments"): shutil.copytree(ROOT/part, root/part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/".dvcignore", root)
    stages = {name: dict(cmd=f"echo made > {name}", deps=[d for d in BODY[name]["deps"] if d.startswith(("artifacts/code", "nbs"))], outs=[name]) for name in NOTEBOOKS}
    (root/"dvc.yaml").write_text(yaml.safe_dump(dict(stages={"code": STAGES["code"], **stages})))
    Repo.init(str(root), no_scm=True).close()
    return root


@pytest.fixture
def corridor(repository, monkeypatch):
    "That repository, up to date, as the current folder."
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(repository)
    with Repo() as repo: repo.reproduce()
    return repository


def stale():
    "Stages that are not up to date, once it is known what their code is."
    with Repo() as repo:
        repo.reproduce("code", single_item=True)
        return set(repo.status())


@contextmanager
def edited(path, edit):
    "While in this context, a file is what `edit` makes of its text; whatever else, all is up to date before and after."
    before = path.read_text()
    assert not stale() and edit(before) != before
    path.write_text(edit(before))
    try: yield
    finally: path.write_text(before)
    assert not stale()


def code_of(corridor, name): return json.loads((corridor/f"artifacts/code/{name}.json").read_text())


@pytest.mark.parametrize("module", ["core", "grammar", "video", "train", "report", "tier", "cli", "_modidx"])
def test_a_change_of_a_module_makes_exactly_those_stages_stale_that_reach_it(corridor, module):
    path, expected = corridor/f"mmqlora/{module}.py", {name for name in NOTEBOOKS if module in reached(ROOT/f"nbs/experiments/{name}.ipynb")}
    with edited(path, lambda text: text + "# changed\n"):
        assert stale() == expected
        assert {name for name in NOTEBOOKS if code_of(corridor, name).get(module) == md5(path.read_bytes()).hexdigest()} == expected


def test_what_is_imported_counts_from_when_it_is_until_it_no_longer_is(corridor):
    with edited(corridor/"mmqlora/statistics.py", lambda text: text + "from .meteor import meteor_exact\n"):
        assert stale() == {"report"} and "meteor" in code_of(corridor, "report")
    with edited(corridor/"nbs/experiments/report.ipynb", lambda text: text.replace("mmqlora.report", "mmqlora.metrics")):
        assert stale() == {"report"} and "report" not in code_of(corridor, "report")


def test_a_run_is_recorded_as_dvc_records_it(corridor):
    lock = corridor/"dvc.lock"
    told = lock.read_text()
    lock.write_text("\n".join(told.splitlines()[:-5]) + "\n")          # the last stage lost what it made
    [lost] = stale()
    assert runs.reproduce(lost) == "" and not stale()
    assert lock.read_text() == told


def test_what_is_recorded_reads_as_what_dvc_would_have_written(tmp_path):
    values = dict(text=["1e5", "0123", "on", "no", "12:30", "~", "", "a: b", "über", "x "*99], numbers=[1e-5, 8e-3, 1e20, 12, True, None], rows=[OrderedDict(z=1, a={})])
    for name, modify in (("ours", runs.modify_yaml), ("theirs", runs.in_its_layout)):
        shutil.copy(ROOT/"dvc.lock", tmp_path/name)
        with modify(tmp_path/name) as data: data["stages"]["new"] = values
    told = [YAML(typ="safe").load(tmp_path/name) for name in ("ours", "theirs")]
    assert told[0] == told[1] and told[0]["stages"]["new"]["text"] == values["text"] and list(told[0]["stages"]) == list(told[1]["stages"])
    with runs.in_its_layout(tmp_path/"ours"): pass
    assert (tmp_path/"ours").read_text() == (tmp_path/"theirs").read_text()


def test_there_is_a_stage_for_every_experiment_and_a_run_for_every_line_of_params():
    assert set(NOTEBOOKS) == {p.stem for p in (ROOT/"nbs/experiments").glob("*.ipynb")}
    assert STAGES["finetune"]["foreach"] == "${runs}"


@pytest.mark.parametrize("name", BODY)
def test_no_stage_writes_into_data_and_no_executed_notebook_is_a_dep(name):
    assert not [o for o in outs(BODY[name]) if o.startswith("data")]
    assert not [d for d in BODY[name]["deps"] if "executed" in d]


@pytest.mark.parametrize("name", BODY)
def test_params_of_a_stage_exist(name):
    for key in BODY[name].get("params", []):
        value = PARAMS
        for part in key.replace("${profile}", "cpu").replace("${key}", "qlora").split("."): value = value[part]


FROZEN = {"pretrain", "tune", "decode", "efficiency", "cpu", "merged", "gpu"}


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if n not in FROZEN])
def test_a_notebook_reads_no_section_of_params_that_is_not_declared(name):
    source = "\n".join(s for s, _ in code_cells(ROOT/f"nbs/experiments/{name}.ipynb"))
    declared = {key.split(".")[0] for key in BODY[name]["params"]}
    assert set(re.findall(r"params\.(\w+)", source)) <= declared


def test_stages_that_need_a_gpu_or_choose_rates_or_time_a_machine_are_frozen():
    assert {n for n, body in BODY.items() if body.get("frozen")} == FROZEN


@pytest.fixture
def tiny(corpus, tmp_path, monkeypatch):
    "A repository of 16 training clips in which two runs of two steps can be made."
    root, records = corpus
    params = dict(PARAMS, profile="tiny", profiles={"tiny": {"clips": {"train": 16, "dev": 8, "test": 8, "ood": 8}, "steps": 2}})
    params["corpus"] = dict(params["corpus"], root="data")
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path/"models").symlink_to(ROOT/"models")
    write_records(tmp_path/"data", records)
    for split in ("train", "test", "ood"):
        sets, _ = prepare(root, [r for r in records if r.split == split], load_params(tmp_path/"params.yaml").frames, workers=1, label=split)
        for name in ("entropy-8", "uniform-4"): save_clips(tmp_path/f"artifacts/frames/{name}/{split}.safetensors", sets[name])
    return tmp_path


@pytest.mark.parametrize("name, trained", [("zeroshot", False), ("tqlora", True)])
def test_a_run_makes_a_complete_record(tiny, monkeypatch, name, trained):
    monkeypatch.setattr("mmqlora.runs.repo_path", lambda *parts: repo_path(*parts) if parts[0] == "models/base" else tiny.joinpath(*parts))
    record = run_experiment(load_params(tiny/"params.yaml"), name)
    check_record(record, name)
    seeds = len(record["config"]["seeds"])
    assert all(0 <= record["metrics"][m]["value"] <= 1 for m in ("test.exact", "ood.slots", "test.t2v_r1", "test.v2t_map"))
    assert [len(row) for row in record["per_clip"]["test.exact"]] == [8]*seeds
    cost = record["cost"]
    for measured in ("flops", "peak_bytes", "step_cpu_ms"): assert (cost[measured] > 0) == trained, measured
    assert cost["model_bytes"] < cost["peak_bytes"] < cost["peak_rss_bytes"] or not trained
    assert 0 < cost["start_seconds"] and cost["start_seconds"] + seeds*(cost["train_seconds"] + cost["eval_seconds"]) <= cost["total_seconds"] + .1
    assert all(0 <= record["metrics"][f"{s}.meteor_exact"]["value"] <= 1 for s in ("test", "ood"))
    assert (cost["trainable_params"] > 0) == trained == bool(record["curve"]["step"])
    assert len(list((tiny/f"artifacts/adapters/{name}").glob("seed*/adapter_model.safetensors"))) == (seeds if trained else 0)
    assert not list((tiny/"artifacts").rglob("*.checkpoint.safetensors"))
    assert ("test.questions" in record["metrics"]) == ("base.slots" in record["per_clip"]) == (name == "zeroshot")       # its `checks`
    assert set(record["corruptions"]) == set(record["galleries"]["ood"])
    assert (set(record["spectra"]) == {"vision", "fusion", "text"}) == trained
    assert not trained or len(record["gates"]["text"][0]) == 4 and len(record["gates"]["signals"][0][0]) == 9
    assert [len(row) for row in record["gallery"]] == [8]*8


def test_committed_records_are_input_for_the_report_with_what_came_later_or_without():
    for path in sorted((ROOT/"results").glob("[cg]pu/*.json")):
        record = read_json(path)
        check_record(record, path)
        older = record | dict(cost={k: v for k, v in record["cost"].items() if k not in LATER["cost"]})
        check_record(older | dict(metrics={k: v for k, v in record["metrics"].items() if k not in LATER["metrics"]}), path)
        with pytest.raises(InputError, match="cost.flops: expected a number"): check_record(record | dict(cost=record["cost"] | dict(flops="many")), path)
        with pytest.raises(InputError, match="metrics.ood.meteor_exact.value: missing"): check_record(record | dict(metrics=record["metrics"] | {"ood.meteor_exact": {}}), path)


def test_committed_results_carry_their_provenance():
    for path in sorted((ROOT/"results").rglob("*.json")):
        record = read_json(path)
        assert {"config", "config_hash", "code_version", "versions", "hardware", "tier"} <= record.keys(), path


def executed(folder, source, **env):
    "(exit code, outputs of the copy) of a notebook of one cell that is run in `folder`."
    cells = [nbformat.v4.new_code_cell("word = 'none'", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3"))), folder/"try.ipynb")
    done = subprocess.run([ROOT/"scripts/notebook.sh", "try.ipynb", "-p", "word", "told"], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)
    return done, nbformat.read(folder/"artifacts/executed/try-told.ipynb", 4).cells[-1].outputs


def test_a_notebook_is_run_in_one_process_its_outputs_kept_and_its_error_told(tmp_path):
    done, [said, value] = executed(tmp_path, "print(word)\n1 + 1")
    assert done.returncode == 0 and done.stdout == "told\n" == said.text and value.data["text/plain"] == "2"
    done, [error] = executed(tmp_path, "raise ValueError(word)")
    assert done.returncode == 1 and "ValueError" in done.stderr and (error.ename, error.evalue) == ("ValueError", "told")


def test_runs_are_forks_of_a_process_that_has_imported_torch_and_end_with_who_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("MMQLORA_WARM", "")
    with runs.warm():
        done, [value] = executed(tmp_path, "import sys; 'torch' in sys.modules, word")
        assert done.returncode == 0 and value.data["text/plain"] == "(True, 'told')"
        assert executed(tmp_path, "raise SystemExit(3)")[0].returncode == 1
        monkeypatch.setenv("MMQLORA_CORES", "1")                          # set after the engine began
        assert executed(tmp_path, "import os; os.environ['MMQLORA_CORES']")[1][0].data["text/plain"] == "'1'"


def test_the_heaviest_runs_start_first():
    weights = {name: runs.weight(run_config(load_params(), name)) for name in ("zeroshot", "qlora-uniform-k2", "qlora-d400", "qlora")}
    assert sorted(weights, key=weights.get) == list(weights)
    params = load_params()
    known = {name: runs.expected(params, name) for name in ("qlora-small", "qlora", "qlora-large")}
    assert sorted(known, key=known.get) == list(known) and known["qlora"] == read_json(ROOT/"results/cpu/qlora.json")["cost"]["total_seconds"]
    never = params.model_copy(update={"profile": "smoke"})
    assert runs.expected(never, "qlora") == runs.weight(run_config(never, "qlora"))
