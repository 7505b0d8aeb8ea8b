#!/usr/bin/env python3
"""Runs of params.yaml (those given, or all) that are not up to date, one per core at a time: what `dvc repro finetune` does in turn.

DVC executes, locks and records every run when it ends: stop and start as you like. A run has one core, and trains its seeds in a
row; where fewer runs are left than there are cores, their seeds share the cores (`MMQLORA_CORES` in `mmqlora.runs`). The longest start
first, as far as records tell, so that the last ones end together. All are forks of one process that has imported torch (`scripts/engine.py`)."""
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import dvc.dvcfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml as in_its_layout
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from mmqlora.config import Params, RunConfig, load_params, run_config
from mmqlora.core import atomic_path, cores, read_json, repo_path


def stale(runs:list[str]) -> list[str]:
    "Stages `finetune@run` whose inputs or results changed: of these runs, or of all; what their code is, is found out first."
    with Repo(_wait_for_lock=True) as repo:
        repo.reproduce("code", single_item=True)
        return list(repo.status([f"finetune@{r}" for r in runs] or ["finetune"]))


def weight(config:RunConfig) -> float:
    "About how long a run takes, in seconds of a slow core."
    slow = 1.6 if config.quantization == "int8" or "dora" in config.method else 1.
    return 5 + len(config.seeds)*(slow*(8 + config.frames)*(.2 + config.steps/200) + 4*len(config.checks))


def expected(params:Params, name:str) -> float:
    "The seconds that a run took when it was last recorded under this profile, as is mostly the case; else its `weight`."
    record = repo_path("results", params.profile, f"{name}.json")
    return read_json(record)["cost"]["total_seconds"] if record.is_file() else weight(run_config(params, name))


LOCK = YAML(typ="safe")                      # libyaml's: DVC reads with it too, but writes with the one that keeps comments and takes ten times as long
LOCK.default_flow_style, LOCK.sort_base_mapping_type_on_output = False, False
LOCK.representer.add_representer(OrderedDict, SafeRepresenter.represent_dict)


@contextmanager
def modify_yaml(path, fs=None):
    "As DVC's own, for what it writes while runs are made: dvc.lock, in which nobody writes comments."
    path = Path(path)
    data = path.is_file() and LOCK.load(path) or {}
    yield data
    with atomic_path(path) as tmp: LOCK.dump(data, tmp)


dvc.dvcfile.modify_yaml = modify_yaml        # for `Lockfile.dump_stages`, here and in the workers


def reproduce(stage:str) -> str:
    "Empty, or what went wrong."
    try:
        with Repo(_wait_for_lock=True) as repo: repo.reproduce(stage, single_item=True)
    except DvcException as err: return f"{stage}: {err}"
    return ""


@contextmanager
def warm():
    "While in this context, scripts/notebook.sh asks one process, which has imported everything, for its forks."
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        os.environ["MMQLORA_WARM"] = f"{folder}/socket"
        listener.bind(os.environ["MMQLORA_WARM"])
        listener.listen(64)
        engine = subprocess.Popen([sys.executable, Path(__file__).with_name("engine.py")], stdin=listener)
        try: yield
        finally:
            engine.terminate()
            engine.wait()


def walk(weights:dict[str, float], workers:int) -> list[str]:
    "Reproduce stages, the heaviest first, with a line after each; what went wrong."
    begin, done, wrong = time.monotonic(), 0., []
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        jobs = {pool.submit(reproduce, s): s for s in sorted(weights, key=weights.get, reverse=True)}
        for n, job in enumerate(as_completed(jobs), 1):
            wrong += [job.result()] if job.result() else []
            done += weights[jobs[job]]/sum(weights.values())
            minutes = (time.monotonic() - begin)/60
            print(f"== {n} of {len(weights)} runs, {minutes:.0f} min, about {minutes*(1 - done)/done:.0f} min left ({jobs[job]})", flush=True)
    return wrong


def main() -> int:
    begin, have, params = time.monotonic(), cores(), load_params()
    with warm():                              # imports while DVC finds out what is stale
        try: waiting = stale(sys.argv[1:])
        except DvcException as err: sys.exit(f"mmqlora: {err}")
        if not waiting: return 0
        os.environ["MMQLORA_CORES"] = str(max(1, have//len(waiting)))          # travels with each run: the engine lives already
        try: wrong = walk({s: expected(params, s.partition("@")[2]) for s in waiting}, min(have, len(waiting)))
        finally:                                                             # DVC breaks long lines elsewhere, which git would tell
            with Repo(_wait_for_lock=True) as repo, repo.lock, in_its_layout(repo_path("dvc.lock")): pass
    print(f"== {len(waiting)} runs, {(time.monotonic() - begin)/60:.1f} min in all", flush=True)
    for line in wrong: print(f"mmqlora: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
