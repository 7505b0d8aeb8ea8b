"The tier gpu, small and on a CPU: from scripts to a base model, through the queue with two processes, to records."
import time

import pytest
import torch
import yaml
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmqlora import tier
from mmqlora.config import load_params, run_config
from mmqlora.core import read_json, repo_path, write_json
from mmqlora.report import check_record
from mmqlora.grammar import vocabulary
from mmqlora.tier import chosen_rates, collect, jobs_of, make_base, make_corpus, run_queue, run_trials

CLIPS = {"train": 8, "dev": 8, "test": 8, "ood": 8}


def stand_in():
    "A random two-layer Llama and a tokenizer of word pieces, in place of SmolLM2."
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces.train_from_iterator([" ".join(vocabulary())]*2, trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                        vocab_size=len(tokenizer), tie_word_embeddings=True)), tokenizer


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    "A repository with two runs, 8 clips a split, 4 frames of 48 pixels; its corpus and its base model."
    root, patch = tmp_path_factory.mktemp("tier"), pytest.MonkeyPatch()
    data = yaml.safe_load((ROOT/"params.yaml").read_text())
    data["runs"] = {"zeroshot": {"method": "frozen", "seeds": [0, 1]}, "tqlora": {"gate": "rank", "checks": ["retention", "disorder"]},
                    "early": {"frames": 2, "method": "full", "tasks": ["caption", "languages", "questions", "instructions"], "checks": ["tasks"]}}
    data["frames"]["selectors"] = ["entropy"]
    profile = data["profiles"]["gpu"]
    profile |= dict(clips=CLIPS, steps=2, seeds=[0, 1], runs={}, only=None)
    profile["corpus"] |= dict(clips=CLIPS, side=48)
    profile["frames"] = dict(budgets=[2, 4], size=48)
    profile["override"]["all"] |= dict(batch_size=4, frames=4)
    data["gpu"] |= dict(vision=dict(hidden=64, layers=1, mlp=64), patch=8, scale=3, clips=16, held_out=8, tower_seconds=1, seconds=2, batch_size=4,
                        grid={"tqlora": {"lr": [1e-3, 2e-3]}})
    (root/"params.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    patch.chdir(root)                                                     # `repo_path` looks from here, in the processes of the queue too
    params = load_params(profile="gpu")
    make_corpus(params, workers=1)
    log = make_base(*stand_in(), params.gpu, repo_path("artifacts/gpu/base"), size=48, frames=4, device="cpu", workers=1)
    write_json(repo_path("artifacts/gpu/base/log.json"), log)
    yield params
    patch.undo()


def test_the_base_model_has_a_log_and_knows_its_marks(params):
    log = read_json(repo_path("artifacts/gpu/base/log.json"))
    assert log["curve"][-1]["step"] > 0 and log["tower"][-1]["step"] > 0 and set(log["held_out_exact"]) <= {"sequence", "pair", "single", "still"}


def test_a_queue_goes_on_with_what_is_missing_and_ends_in_complete_records(params, capfd):
    jobs = jobs_of(params)
    assert run_queue(params, jobs, deadline=time.time() - 1, workers=0) == jobs                      # no time: nothing is begun
    assert run_queue(params, jobs[:2], workers=0) == []
    first = repo_path("artifacts/gpu/queue", f"{jobs[0].key}.json").stat().st_mtime_ns
    assert set(collect(params)[1]) == {"tqlora", "early"}
    assert run_queue(params, jobs, workers=2) == []
    assert repo_path("artifacts/gpu/queue", f"{jobs[0].key}.json").stat().st_mtime_ns == first      # done is done
    records, missing = collect(params)
    assert not missing
    for run, record in records.items():
        check_record(record, run)
        assert record["tier"] == "gpu" and record["base"] and record["date"] and len(record["per_clip"]["test.exact"]) == len(record["config"]["seeds"])
    assert {"test.exact_disordered", "base.exact"} <= set(records["tqlora"]["metrics"]) and "test.questions" in records["early"]["metrics"]
    for measured in ("flops", "peak_bytes", "step_cpu_ms"): assert records["tqlora"]["cost"][measured] > 0 == records["zeroshot"]["cost"][measured]
    for record in records.values(): assert 0 < record["cost"]["start_seconds"] < record["cost"]["total_seconds"] and "ood.meteor_exact" in record["metrics"]
    assert records["tqlora"]["cost"]["trainable_params"] > 0 == records["zeroshot"]["cost"]["trainable_params"]


def test_a_job_that_fails_leaves_its_traceback_and_the_others_go_on(params, capfd):
    bad = tier.Job("tqlora", 5, (("batch_size", 999),))
    good = tier.Job("zeroshot", 7)
    assert run_queue(params, [bad, good], workers=0) == [bad]
    assert "999 clips a batch" in repo_path("artifacts/gpu/queue", f"{bad.key}.error").read_text()


def test_a_job_that_ran_out_of_memory_is_tried_once_more(params, capfd, monkeypatch):
    tries, do_job = [], tier.do_job
    def short(*args):
        tries.append(args[1].key)
        if len(tries) == 1: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return do_job(*args)
    monkeypatch.setattr(tier, "do_job", short)
    assert run_queue(params, [tier.Job("zeroshot", 9)], workers=0) == [] and tries == ["zeroshot-seed9"]*2


def test_rates_are_chosen_by_dev_loss(params):
    trials, missing = run_trials(params, workers=0)
    assert not missing and [t["seed"] for t in trials] == [params.tune.seed, params.tune.seed + 1]*2
    mean = {lr: sum(t["loss"] for t in trials if t["lr"] == lr)/2 for lr in {t["lr"] for t in trials}}
    lower = min(mean)
    expected = lower if mean[lower] <= tier.SLACK["lr"]*min(mean.values()) else max(mean)
    assert chosen_rates(params, trials) == {"gated": {"lr": expected}}


def test_a_lower_rate_is_taken_within_a_tenth_of_the_least_loss_but_not_for_gates(params, monkeypatch):
    monkeypatch.setattr(tier, "tuned_fields", lambda params: {"tqlora": {"lr": [1., 2.], "gate_lr": [1., 2.]}})
    trials = [dict(run="tqlora", seed=0, loss=loss, **{field: value}) for field in ("lr", "gate_lr") for value, loss in ((1., .105), (2., .1))]
    assert chosen_rates(params, trials) == {"gated": {"lr": 1., "gate_lr": 2.}}


def test_gates_are_tried_with_the_rate_that_was_chosen_for_their_method(params, monkeypatch):
    rates, grid = [], {"tqlora": {"gate_lr": [2.]}, "plain": {"lr": [1e-3, 1e-2]}}
    params = params.model_copy(update={"gpu": params.gpu.model_copy(update={"grid": grid}), "runs": params.runs | {"plain": {}}})
    monkeypatch.setattr(tier, "run_queue", lambda p, jobs, **kw: rates.append(run_config(p, "tqlora").lr) or [])
    monkeypatch.setattr(tier, "read_trials", lambda jobs, out: [dict(run=j.run, seed=j.seed, loss=abs(v - 1e-2), **{f: v}) for j in jobs for f, v in j.change])
    run_trials(params)
    assert rates[0] == run_config(params, "tqlora").lr and rates[1] == 1e-2


def test_another_base_model_makes_every_job_due_again(params):
    assert not tier.is_done(params, tier.Job("zeroshot", 0), repo_path("artifacts/gpu/queue"), "another")
