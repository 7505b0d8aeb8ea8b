#!/usr/bin/env python3
"""Ways to step a small model on this GPU, for runs of the tier `gpu`: scripts/small_steps.py [RUN ...] [--ways WAY ...] [--base FOLDER] [--out FILE]

stock: peft and bitsandbytes; lean: room 08f; recorded, again: 08i on top of it, twice. The first run has the card to itself, the others share it.
Ten steps a way, on random frames: milliseconds, losses, peak GiB."""
import argparse
import time
import traceback
from contextlib import nullcontext
from multiprocessing import get_context
from unittest.mock import patch

import torch

from mmqlora import train
from mmqlora.batch import ClipSet
from mmqlora.config import load_params, run_config
from mmqlora.core import InputError, read_json, repo_path, result_record, write_json
from mmqlora.tier import provenance

CAPTIONS = ["the red disc hops , and then the blue square spins .", "first the red disc hops , and then the blue square spins .", "a disc ."]*32
WAYS = "stock", "lean", "recorded", "again"


def steps(trainer, way:str) -> tuple[list[float], list[float]]:
    "(milliseconds, losses) of ten steps."
    took, loss = [], []
    with trainer.recording() if way in WAYS[2:] else nullcontext():
        if way in WAYS[2:] and not trainer.recorded: raise InputError(way, "steps of this run cannot be recorded", "--ways stock lean")
        for n in range(10):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            loss.append(round(trainer.step(n), 4))
            torch.cuda.synchronize()
            took.append(round(1000*(time.perf_counter() - begin), 1))
    return took, loss


def measured(run:str, base:str, frames:int|None, ways) -> dict:
    config = run_config(load_params(profile="gpu"), run)
    config = config.model_copy(update=dict(base=base, tasks=["caption"], frames=frames or config.frames))
    torch.manual_seed(0)
    k, told = config.frames, dict(run=run, frames=config.frames)
    clips = ClipSet(torch.randint(0, 256, (96, k, 3, 96, 96), dtype=torch.uint8).cuda(), torch.linspace(.03, .97, k).expand(96, k), torch.rand(96, k, 9))
    for way in ways:
        with patch.object(train, "lean", lambda model: model) if way == "stock" else nullcontext():
            model, tokenizer = train.build(base, config, calibration=(clips, CAPTIONS))
        trainer = train.Trainer(model.train(), tokenizer, clips, CAPTIONS, config)
        torch.cuda.reset_peak_memory_stats()
        told[f"{way}_ms"], told[f"{way}_loss"] = steps(trainer, way)
        told[f"{way}_gib"] = round(torch.cuda.max_memory_allocated()/2**30, 2)
        del model, trainer
        torch.cuda.empty_cache()
    return told


def one(run:str, base:str, frames:int|None, ways, out):
    torch.set_num_threads(1)
    try: told = measured(run, base, frames, ways)
    except Exception: told = dict(run=run, error=traceback.format_exc())
    print(told, flush=True)
    write_json(out, told)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=["qlora", "qlora-k4", "full", "lora", "qdora", "bottleneck", "prefix"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--base", default="artifacts/gpu/base", help="a base of the tier gpu; what it has learned does not matter")
    parser.add_argument("--out", default="results/benchmarks/small_steps.json")
    args = parser.parse_args()
    spawn, parts = get_context("spawn"), [repo_path("artifacts/small_steps", f"{run}.json") for run in args.runs]
    jobs = [spawn.Process(target=one, args=(run, args.base, 4 if i else None, args.ways, part)) for i, (run, part) in enumerate(zip(args.runs, parts))]
    jobs[0].start()
    jobs[0].join()
    for job in jobs[1:]: job.start()
    for job in jobs[1:]: job.join()
    record = result_record("small_steps", "benchmarks", {"runs": args.runs, "ways": list(args.ways)}, {}, {}, cases=[read_json(p) for p in parts])
    write_json(repo_path(args.out), record | provenance("scripts/small_steps.py"))


if __name__ == "__main__": main()
