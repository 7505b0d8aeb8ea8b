#!/usr/bin/env python3
"""Runs of params.yaml (those given, or all) that are not up to date, one per core at a time: what `dvc repro finetune` does in turn.

DVC executes, locks and records every run when it ends: stop and start as you like. A run has one core, and trains its seeds in a
row; where fewer runs are left than there are cores, their seeds share the cores (`MMQLORA_CORES` in `mmqlora.runs`)."""
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from dvc.exceptions import DvcException
from dvc.repo import Repo


def stale(runs:list[str]) -> list[str]:
    "Stages `finetune@run` whose inputs or results changed: of these runs, or of all."
    with Repo() as repo: return list(repo.status([f"finetune@{r}" for r in runs] or ["finetune"]))


def reproduce(stage:str) -> str:
    "Empty, or what went wrong."
    try:
        with Repo(_wait_for_lock=True) as repo: repo.reproduce(stage, single_item=True)
    except DvcException as err: return f"{stage}: {err}"
    return ""


def main() -> int:
    waiting, begin, wrong = stale(sys.argv[1:]), time.monotonic(), []
    if not waiting: return 0
    cores = int(os.environ.get("MMQLORA_CORES") or len(os.sched_getaffinity(0)))
    os.environ["MMQLORA_CORES"] = str(max(1, cores//len(waiting)))
    with ProcessPoolExecutor(min(cores, len(waiting)), get_context("fork")) as pool:
        for done, job in enumerate(as_completed([pool.submit(reproduce, s) for s in waiting]), 1):
            wrong += [job.result()] if job.result() else []
            seconds = time.monotonic() - begin
            print(f"== {done} of {len(waiting)} runs, {seconds/60:.0f} min, about {seconds/done*(len(waiting) - done)/60:.0f} min left", flush=True)
    for line in wrong: print(f"mmqlora: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
