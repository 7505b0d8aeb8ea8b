"Every result file that is committed holds what the report reads, made with the settings that params.yaml has."
import json
import shutil
import tempfile

import pytest
from conftest import ROOT

from mmqlora.config import load_params, run_config, under
from mmqlora.core import InputError, content_hash, read_json, write_json
from mmqlora.report import LEASES, check_record, load_gpu, load_lease

TIERS = ("cpu", "gpu")
FILES = [p for tier in TIERS for p in sorted((ROOT/"results"/tier).glob("*.json"))]
OTHERS = sorted(p for name in LEASES for p in (ROOT/f"results/gpu-{name}").glob("*.json"))


@pytest.fixture(scope="module")
def settings(): return {tier: under(load_params(), tier) for tier in TIERS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_committed_record_is_whole_and_of_these_settings(path, settings):
    record, params = read_json(path), settings[path.parent.name]
    check_record(record, path)
    assert record["run"] == path.stem and record["tier"] == path.parent.name
    assert path.stem in params.runs, "no run of params.yaml"
    config = run_config(params, path.stem).model_dump()
    assert record["config_hash"] == content_hash(config) == content_hash(record["config"])
    seeds = len(record["config"]["seeds"])
    assert {len(v) for v in record["per_clip"].values()} == {seeds}
    assert {len(record["metrics"][f"{s}.exact"]["seeds"]) for s in ("test", "ood")} == {seeds}


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.stem)
def test_a_record_of_another_lease_is_whole_and_agrees_with_itself(path):
    record = read_json(path)
    check_record(record, path)
    assert record["run"] == path.stem and record["tier"] == "gpu"
    assert record["config_hash"] == content_hash(record["config"])
    seeds = len(record["config"]["seeds"])
    assert {len(v) for v in record["per_clip"].values()} == {seeds} == {len(record["metrics"]["test.exact"]["seeds"])}


def test_there_are_records_of_both_tiers(): assert {p.parent.name for p in FILES} == set(TIERS)


@pytest.fixture
def folder(tmp_path_factory):
    (ROOT/"artifacts").mkdir(exist_ok=True)                                 # a clean clone has none
    made = tempfile.mkdtemp(dir=ROOT/"artifacts", prefix=".test-")
    yield made
    shutil.rmtree(made)


def test_a_bad_record_of_the_tier_gpu_is_one_clear_error(folder):
    whole = read_json(ROOT/"results/gpu/lora.json")
    write_json(f"{folder}/lora.json", whole)
    assert list(load_gpu(folder)) == ["lora"]
    write_json(f"{folder}/full.json", {k: v for k, v in read_json(ROOT/"results/gpu/full.json").items() if k != "audit"})
    with pytest.raises(InputError, match=r"full\.json: audit: missing"): load_gpu(folder)
    write_json(f"{folder}/full.json", read_json(ROOT/"results/gpu/full.json") | {"config_hash": "0"})
    with pytest.raises(InputError, match=r"full\.json.*other settings"): load_gpu(folder)
    (ROOT/folder/"full.json").rename(ROOT/folder/"nobody.json")
    with pytest.raises(InputError, match="no run 'nobody'"): load_gpu(folder)


def test_a_bad_record_of_another_lease_is_one_clear_error(folder):
    whole = read_json(OTHERS[0])
    write_json(f"{folder}/{whole['run']}.json", whole)
    assert list(load_lease(folder)) == [whole["run"]]
    write_json(f"{folder}/{whole['run']}.json", whole | {"config": whole["config"] | {"lr": 1.}})
    with pytest.raises(InputError, match="its hash is not that of its settings"): load_lease(folder)
    (ROOT/folder/f"{whole['run']}.json").rename(ROOT/folder/"other.json")
    with pytest.raises(InputError, match=f"other.json: holds run '{whole['run']}'"): load_lease(folder)


def test_every_lease_that_is_kept_is_read():
    assert {p.name for p in (ROOT/"results").glob("gpu-*") if p.is_dir()} == {f"gpu-{name}" for name in LEASES}


@pytest.mark.parametrize("lease", ["gpu", *(f"gpu-{name}" for name in LEASES)])
def test_the_runs_of_a_lease_share_its_base_model(lease):
    bases = {read_json(p)["base"] for p in (ROOT/"results"/lease).glob("*.json")}
    assert len(bases) == 1


def test_the_rates_of_the_tier_gpu_were_tried_on_the_base_of_one_of_its_leases():
    bases = {read_json(p)["base"] for lease in ("gpu", *(f"gpu-{name}" for name in LEASES)) for p in (ROOT/"results"/lease).glob("*.json")}
    assert read_json(ROOT/"results/gpu-tune.json")["base_hash"] in bases


@pytest.mark.parametrize("name, chosen", [("tune", False), ("gpu-tune", True)])
def test_the_rates_that_were_tried_hold_a_loss_for_every_value_of_the_grid(name, chosen):
    record = json.loads((ROOT/f"results/{name}.json").read_text())
    for run, grid in record["config"]["grid"].items():
        for field, values in grid.items():
            tried = {t[field]: t["loss"] for t in record["trials"] if t["run"] == run}
            assert set(values) <= set(tried) and all(0 < loss < 100 for loss in tried.values()), (run, field)
    assert not chosen or record["chosen"]


@pytest.mark.parametrize("name, keys", [("cpu", ("costs", "rates")), ("merged", ("merged",)), ("decode", ("decoding", "seeking"))])
def test_benchmarks_hold_what_the_report_reads_and_where_they_were_made(name, keys):
    record = read_json(ROOT/f"results/benchmarks/{name}.json")
    assert {*keys, "code_version", "versions", "hardware"} <= set(record)
