#!/usr/bin/env python3
"""The stage `gpu` in steps, for a machine that is lent for minutes: scripts/gpu.py STEP [options]. CONTRIBUTING.md says how.

The functions are those that nbs/experiments/gpu.ipynb calls; what a step makes lies in artifacts/gpu, so that the next goes on.
"""
import argparse, os, tarfile, tempfile, time
from pathlib import Path

import yaml

from mmqlora.config import load_params, read_yaml
from mmqlora.core import InputError, read_json, repo_path, write_json

RATES, HERE = "artifacts/gpu/tune.json", "artifacts/gpu"


def changed(sets):
    "params.yaml with KEY=VALUE changes (dots go down), under the profile gpu."
    data = read_yaml(repo_path("params.yaml"))
    for item in sets:
        path, value = item.split("=", 1)
        *way, last = path.split(".")
        place = data
        for key in way: place = place.setdefault(key, {})
        place[last] = yaml.safe_load(value)
    with tempfile.TemporaryDirectory() as d:
        file = Path(d)/"params.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        return load_params(file, profile="gpu")


def corpus(params, args):
    from mmqlora.tier import make_corpus
    make_corpus(params, workers=args.workers or len(os.sched_getaffinity(0)))


def base(params, args):
    from mmqlora.smollm2 import read_gguf
    from mmqlora.tier import make_base, provenance
    log = make_base(*read_gguf(args.gguf), params.gpu, repo_path(HERE, "base"), params.frames.size)
    write_json(repo_path(HERE, "base", "log.json"), log | provenance(args.command, args.commit))


def tune(params, args):
    from mmqlora.tier import chosen_rates, provenance, run_trials
    about = provenance(args.command, args.commit)
    trials, missing = run_trials(params, deadline=args.deadline, about=about, workers=args.workers)
    write_json(repo_path(RATES), dict(trials=trials, chosen=chosen_rates(params, trials), missing=[j.key for j in missing], **about))
    print(yaml.safe_dump(read_json(repo_path(RATES))["chosen"]), *sorted(trials, key=str), sep="\n")


def rated(params):
    from mmqlora.tier import with_rates
    return with_rates(params, read_json(repo_path(RATES))["chosen"]) if repo_path(RATES).is_file() else params


def runs(params, args):
    from mmqlora.tier import jobs_of, more_of, provenance, run_queue
    params = rated(params)
    missing = run_queue(params, jobs_of(params, args.only) + more_of(params, args.only), deadline=args.deadline, about=provenance(args.command, args.commit), workers=args.workers)
    print(f"{len(missing)} jobs missing:", *[j.key for j in missing])


def collect(params, args):
    from mmqlora.tier import collect as records_of, tune_record
    made, missing = records_of(rated(params))
    for run, record in made.items(): write_json(repo_path(args.into, f"{run}.json"), record)
    scores = {run: record["metrics"]["test.exact"] for run, record in made.items()}
    for run, m in scores.items(): print(f"{run:24} exact {m['value']:.3f}", [round(s, 3) for s in m["seeds"]])
    print("not complete:", *missing)
    tuned, log = (read_json(repo_path(HERE, p)) if repo_path(HERE, p).is_file() else None for p in ("tune.json", "base/log.json"))
    if tuned and args.into == "results/gpu": write_json(repo_path("results/gpu-tune.json"), tune_record(params, tuned["trials"], {k: tuned[k] for k in tuned if k not in ("trials", "chosen")}, log))


def bench(params, args):
    "Gates with CUDA graphs, the targets of the low-memory step, then the other gates, until the deadline."
    from mmqlora.benchmark import target_cells
    from mmqlora.overhead import gate_cells, lease
    todo = gate_cells()[:1] + target_cells() + gate_cells()[1:5]
    ways = sorted({c["way"] for c in todo})
    if unknown := {*(args.only or ())} - {*ways}: raise InputError("--only", f"no way '{min(unknown)}' to step", f"choose from: {', '.join(ways)}")
    lease(repo_path(HERE, "efficiency.json"), args.deadline - time.time(), args.commit, todo=[c for c in todo if not args.only or c["way"] in args.only])


def pulse(params, args):
    "Steps of large models that wait for the host, until the deadline, on a machine that has nothing else to do."
    from mmqlora.benchmark import pulse_cells
    from mmqlora.overhead import lease
    lease(repo_path(HERE, "pulse.json"), args.deadline - time.time(), args.commit, todo=pulse_cells())


def _one_size(config, out, commit, file, *rest):
    import numpy as np
    from mmqlora.pretrain import pretrain_on
    pretrain_on((np.load(file, mmap_mode="c"), *rest), config, out, f"scripts/gpu.py sizes: {out.name}", commit)


def sizes(params, args):
    "Bases of other sizes (or of those in --only), side by side, on clips that are rendered once."
    from multiprocessing import get_context
    from mmqlora.pretrain import rendered
    spawn, config = get_context("spawn"), params.pretrain
    with rendered(config, args.workers) as (pixels, *rest):
        print(f"{len(pixels)} base clips", flush=True)
        made = [spawn.Process(target=_one_size, args=(config.of_size(n), repo_path("models", n), args.commit, pixels.filename, *rest)) for n in args.only or config.sizes]
        for p in made: p.start()
        for p in made: p.join()


def _packed(out, paths):
    with tarfile.open(out, "w:gz") as tar:
        for p in paths: tar.add(p, p.relative_to(repo_path()))
    print(f"{out.name}: {len(paths)} files, {out.stat().st_size/1e6:.1f} MB")


def pack(params, args):
    "Everything that must come home: finished jobs and what they were made with, and bases of other sizes."
    here = [repo_path(HERE, p) for p in ("tune.json", "efficiency.json", "pulse.json", "corpus/records.jsonl", "base/log.json", "base/config.json")]
    done = [p for kind in ("json", "error", "txt") for p in repo_path(HERE, "queue").glob(f"[!.]*.{kind}")]      # a dot: just being written
    _packed(Path(args.out)/"gpu.tar.gz", [p for p in here if p.is_file()] + sorted(done))
    found = [repo_path("models", n) for n in params.pretrain.sizes if repo_path("models", n, "README.md").is_file()]
    if found: _packed(Path(args.out)/"sizes.tar.gz", found)


STEPS = dict(corpus=corpus, base=base, bench=bench, pulse=pulse, sizes=sizes, tune=tune, runs=runs, collect=collect, pack=pack)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change params.yaml for this call")
    parser.add_argument("--gguf", default=f"{HERE}/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds since 1970")
    parser.add_argument("--workers", type=int, help="processes (tune, runs: per GPU)")
    parser.add_argument("--only", nargs="+", help="runs, sizes (default: all of params.yaml), or ways of bench")
    parser.add_argument("--into", default="results/gpu", metavar="FOLDER", help="where collect writes (results/gpu-NAME: another lease)")
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""))
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    args = parser.parse_args()
    args.command, begin = f"scripts/gpu.py {args.step}", time.time()
    STEPS[args.step](changed(args.set), args)
    print(f"{args.step}: {time.time() - begin:.0f} s", flush=True)
