"Allocation at equal bytes: budgets are met, optima are optima, the same seed decides the same."
import itertools
import re
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from mmqlora.adapters import load_adapter, save_adapter
from mmqlora.allocate import allocate, best_ranks, budget_of, gains_of, measure, rank_bytes
from mmqlora.batch import ClipSet, pixel_values
from mmqlora.budget import joint_options
from mmqlora.config import RunConfig
from mmqlora.core import InputError, read_json, repo_path, rng_for
from mmqlora.joint import BITS, Option, front, options_for, output_error, plan, solve
from mmqlora.model import linears, load_model
from mmqlora.predict import score_captions
from mmqlora.prune import lora_layers
from mmqlora.quickstart import load
from mmqlora.ranks import adapter_bytes, audit, audit_modules, rank_settings
from mmqlora.train import Trainer, build, calibration_batches, fit, trained_tensors

BASE = repo_path("models/base")
EVERYWHERE = {"vision": 8, "fusion": 8, "text": 8}
RULES = ("uniform", "static", "entropy", "gradient", "eva", "prune", "joint")


def run(allocation, **more): return RunConfig(method="qlora", allocation=allocation, **{"calibration": 8, "batch_size": 8, "steps": 6, "warmup": 1, **more})


def built(training, config, seed=0): return build(BASE, config, seed, device="cpu", calibration=training)


def ranks_in(model): return audit_modules(model).set_index("module")["rank"].to_dict()


def resident(model):
    table = audit(model)
    return int(table["base_bytes"].sum() + table["adapter_bytes"].sum())


@pytest.fixture(scope="module")
def measured(training):
    "(full-precision base, its calibration batches)."
    model, tokenizer = load_model(BASE, "none", device="cpu")
    return model, calibration_batches(model, tokenizer, *training, run("joint"), seed=0)


@pytest.mark.parametrize("rule", RULES)
def test_every_allocation_spends_the_bytes_of_uniform_rank_8_within_one_percent(training, rule):
    reference, _ = built(training, run("uniform"))
    model, tokenizer = built(training, run(rule, ranks={"vision": 4, "fusion": 16, "text": 8} if rule == "static" else EVERYWHERE, budget_rank=8))
    if rule == "prune": fit(Trainer(model, tokenizer, *training, run(rule)))
    spend = resident if rule == "joint" else adapter_bytes
    assert .99 < spend(model)/spend(reference) <= 1
    if rule not in ("uniform", "prune"): assert len(set(ranks_in(model).values())) > 1


@pytest.mark.parametrize("rule, gate", [("uniform", "scalar"), ("uniform", "input"), ("static", "time"), ("gradient", "rank"), ("prune", "rank"), ("prune", "scalar"), ("joint", "rank")])
def test_the_bytes_of_gates_are_part_of_the_budget(training, rule, gate):
    plain, _ = built(training, run("uniform"))
    config = run(rule, budget_rank=8, gate=gate, signals="dense", ranks={"vision": 4, "fusion": 16, "text": 8} if rule == "static" else EVERYWHERE)
    model, tokenizer = built(training, config)
    if rule == "prune": fit(Trainer(model, tokenizer, *training, config))
    gates = sum(4*p.numel() for n, p in model.named_parameters() if {"lora_gate", "lora_input"} & set(n.split(".")))
    spend = resident if rule == "joint" else adapter_bytes
    assert gates > 0 and .99 < spend(model)/spend(plain) <= 1


@pytest.mark.parametrize("gate", ["scalar", "rank"])
def test_a_joint_plan_with_gates_counts_them(training, gate):
    model, tokenizer = load_model(BASE, "none", device="cpu")
    batches = calibration_batches(model, tokenizer, *training, run("joint"), seed=0)[:1]
    asked = plan(options_for(model, batches, EVERYWHERE, gate=gate), 900_000)
    assert asked.bytes == resident(built(training, run("joint", budget_bytes=900_000, gate=gate, calibration=8))[0]) <= 900_000


@pytest.mark.parametrize("rank", [2, 16, 32])
@pytest.mark.parametrize("rule", ["static", "entropy", "gradient", "eva"])
def test_small_and_large_budgets_are_met_as_well(measured, rule, rank):
    model, batches = measured
    budget = budget_of(model, EVERYWHERE, rank=rank)
    found = allocate(model, rule, {"vision": 1, "fusion": 4, "text": 2}, budget, batches)
    assert .99 < sum(r*rank_bytes(model.get_submodule(n)) for n, r in found.items())/budget <= 1


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_allocates_the_same(training, rule):
    one, two = (ranks_in(built(training, run(rule))[0]) for _ in range(2))
    assert one == two


def test_another_seed_draws_other_calibration_clips_and_only_training_clips(training):
    model, tokenizer = load_model(BASE, "nf4", device="cpu")
    drawn = [torch.cat([b["pixel_values"] for b in calibration_batches(model, tokenizer, *training, run("eva"), seed)]) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    own = {clip.numpy().tobytes() for clip in pixel_values(training[0].pixels)}
    assert all(clip.numpy().tobytes() in own for clip in drawn[2]) and len(drawn[2]) == 8


def test_modalities_of_rank_zero_take_no_part(training):
    model, _ = built(training, run("gradient", ranks={"vision": 0, "fusion": 0, "text": 8}))
    table = audit(model).set_index("modality")
    assert table["params"]["vision"] == table["params"]["fusion"] == 0 < table["params"]["text"]


@pytest.mark.parametrize("rule, problem", [("eva", "needs calibration clips"), ("joint", "needs calibration clips")])
def test_a_rule_that_measures_asks_for_clips(rule, problem):
    with pytest.raises(InputError, match=problem): build(BASE, run(rule), device="cpu")


def test_a_budget_below_rank_one_names_what_rank_one_needs(measured):
    with pytest.raises(InputError, match="rank 1 everywhere needs 47616"): allocate(measured[0], "uniform", EVERYWHERE, 1000)


def test_the_fisher_of_a_module_that_the_loss_ignores_is_zero(measured):
    model, batches = measured
    name = "model.text_model.layers.3.mlp.down_proj"
    weight = model.get_submodule(name).weight
    kept = weight.detach().clone()
    weight.data.zero_()                                                  # nothing passes: what feeds it cannot matter
    spectra = measure(model, batches)
    weight.data.copy_(kept)
    assert spectra["model.text_model.layers.3.mlp.up_proj"]["fisher"].sum() == 0 < spectra[name]["fisher"].sum()


def test_measuring_leaves_the_model_as_it_was(measured):
    model, batches = measured
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    measure(model, batches)
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) and p.grad is None for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for ms in linears(model).values() for m in ms.values())


@pytest.mark.parametrize("kind", ["gradient", "eva"])
def test_greedy_ranks_are_within_half_a_percent_of_the_integer_optimum(measured, kind):
    model, batches = measured
    gains = gains_of(measure(model, batches), kind)
    costs = {n: rank_bytes(model.get_submodule(n)) for n in gains}
    budget = budget_of(model, EVERYWHERE)
    options = [Option((n,), r, r*costs[n], -float(g[:r].sum())) for n, g in gains.items() for r in range(1, min(len(g), 32) + 1)]
    greedy = sum(gains[n][:r].sum() for n, r in best_ranks(gains, costs, budget, most=32).items())
    assert 0 <= 1 - greedy/-solve(options, budget).loss < .005


@pytest.mark.parametrize("seed", range(8))
def test_the_solver_equals_brute_force(seed):
    rng = rng_for(seed, "knapsack")
    groups = [[Option((g,), c, int(rng.integers(1, 1000)), float(rng.random())) for c in range(int(rng.integers(1, 5)))] for g in range(6)]
    options, ways = sum(groups, []), [(sum(o.bytes for o in w), sum(o.loss for o in w)) for w in itertools.product(*groups)]
    cheapest, dearest = min(b for b, _ in ways), max(b for b, _ in ways)
    for budget in np.linspace(cheapest, dearest, 5):
        found = solve(options, budget)
        assert found.bytes <= budget and found.loss == pytest.approx(min(v for b, v in ways if b <= budget), abs=1e-6)
        assert set(found.choice) == {o.group for o in options}
    with pytest.raises(InputError, match="the cheapest choice of everything"): solve(options, cheapest - 1)


def test_the_front_never_rises_with_the_budget_and_ends_at_the_best_of_everything(measured):
    model, batches = measured
    options = options_for(model, batches, EVERYWHERE, frames={2: (.6, 1e5), 4: (.3, 2e5), 8: (.1, 4e5)}, state=4)
    groups = {g: [o for o in options if o.group == g] for g in {o.group for o in options}}
    low, high = (sum(f(o.bytes for o in g) for g in groups.values()) for f in (min, max))
    table = front(options, np.geomspace(low, high, 8))
    assert (table["loss"].diff().dropna() <= 1e-6).all() and (table["bytes"] <= table["budget"]).all()
    assert table["loss"].iloc[-1] == pytest.approx(sum(min(o.loss for o in g) for g in groups.values()), abs=1e-6)
    assert plan(options, high).frames == 8 and plan(options, low).frames == 2


@pytest.fixture(scope="module")
def offered(training):
    "Every option with 2, 4 or 8 frames, 16 clips a step."
    model, tokenizer = load_model(BASE, "none", device="cpu")
    clips, captions = training
    def batches(k): return calibration_batches(model, tokenizer, fewer(clips, k), captions, run("joint"), seed=0)
    return joint_options(model, {k: batches(k) for k in (2, 4, 8)}, EVERYWHERE, clips=16, missed={2: .5, 4: .2, 8: 0.}, state=4)


def fewer(clips, k): return ClipSet(*(v[:, ::clips.pixels.shape[1]//k] for v in (clips.pixels, clips.position, clips.signal)))


def test_bits_ranks_and_frames_under_one_budget_equal_brute_force(offered):
    groups = {}
    for o in offered: groups.setdefault(o.group, []).append(o)
    kinds = {kind: [g for g in groups if g[0] == kind] for kind in ("bits", "rank", "frames")}
    some = [*kinds["bits"][:2], *kinds["rank"][:2], *kinds["frames"]]
    options = [o for g in some for o in groups[g]]
    ways = [(sum(o.bytes for o in w), sum(o.loss for o in w), w) for w in itertools.product(*(groups[g] for g in some))]
    seen = set()
    for budget in np.linspace(min(b for b, *_ in ways), max(b for b, *_ in ways), 9):
        found, best = plan(options, budget), min((w for w in ways if w[0] <= budget), key=lambda w: w[1])
        assert found.bytes <= budget and found.loss == pytest.approx(best[1], abs=1e-6)
        seen.add(found.frames)
    assert seen == {2, 4, 8}                                              # the budget decides the frames


def test_frames_cost_the_activations_of_a_step_and_a_plan_states_its_bytes(offered):
    frames = {o.choice: o.bytes for o in offered if o.group == ("frames",)}
    assert 0 < frames[2] < frames[4] < frames[8] and (frames[8] - frames[4])/(frames[4] - frames[2]) == pytest.approx(2, rel=.2)
    budget = 1.5*frames[4]
    found = plan(offered, budget)
    adapters = sum(o.bytes for o in offered if o.group[0] == "rank" and found.ranks[o.group[1]] == o.choice)
    weights = sum(o.bytes for o in offered if o.group[0] == "bits" and found.bits[o.group[1]] == o.choice)
    assert found.bytes == weights + adapters + frames[found.frames] <= budget


def test_more_bits_mean_less_output_error_and_more_bytes_in_every_module(measured):
    table = output_error(*measured)
    error, size = (table.pivot(index="module", columns="bits", values=v)[list(BITS)].to_numpy() for v in ("error", "bytes"))
    assert (np.diff(error) < 0).all() and (np.diff(size) > 0).all()


def test_output_error_refuses_a_quantized_model(measured):
    with pytest.raises(InputError, match="quantized already"): output_error(load_model(BASE, "nf4", device="cpu")[0], measured[1])


def test_a_joint_plan_is_in_the_model_bit_for_bit_and_trains(training):
    config = run("joint", budget_bytes=900_000)                          # beyond NF4 and rank 8: some modules get more bits
    model, tokenizer = load_model(BASE, "none", device="cpu")
    batches = calibration_batches(model, tokenizer, *training, config, seed=0)
    asked = plan(options_for(model, batches, EVERYWHERE), 900_000)
    assert len(set(asked.bits.values())) > 1 and len(set(asked.ranks.values())) > 1
    model, tokenizer = built(training, config)
    table = audit_modules(model).set_index("module")
    assert table["bits"].to_dict() == {n: {"nf4": 4, "int8": 8, "bf16": 16}[b] for n, b in asked.bits.items()}
    assert table["rank"].to_dict() == asked.ranks
    assert .99*900_000 < resident(model) == asked.bytes <= 900_000
    loss = fit(Trainer(model, tokenizer, *training, config))["loss"]
    assert loss[-1] < loss[0]


@pytest.mark.parametrize("gate", ["none", "rank"])
def test_a_joint_adapter_loaded_again_restores_the_bits_of_every_module(training, gate, tmp_path):
    config = run("joint", budget_bytes=900_000, gate=gate)
    model, tokenizer = built(training, config)
    fit(Trainer(model, tokenizer, *training, config))
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword arguments")
        again, _ = load(BASE, tmp_path, device="cpu")
    columns = ["module", "bits", "rank"]
    assert audit_modules(again)[columns].equals(audit_modules(model)[columns]) and read_json(tmp_path/"adapter_config.json")["bits"] == model.planned_bits
    clips, captions = training
    assert torch.equal(score_captions(again, tokenizer, clips, captions), score_captions(model, tokenizer, clips, captions))
    with pytest.raises(InputError, match="quantized already.*quantization='none'"): load_adapter(load_model(BASE, "nf4", device="cpu")[0], tmp_path)
    if gate == "none":                                                    # plain peft refuses what it does not understand
        with pytest.raises(KeyError, match="JOINT, which mmqlora.load loads"): peft.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("gate", ["none", "rank"])
def test_a_pruned_adapter_is_a_plain_one_and_scores_the_same_when_it_is_loaded(training, gate, tmp_path):
    clips, captions = training
    config = run("prune", gate=gate, steps=8)
    model, tokenizer = built(training, config)
    start = adapter_bytes(model)
    trainer = Trainer(model, tokenizer, clips, captions, config)
    fit(trainer)
    assert adapter_bytes(model) < .72*start and len(set(ranks_in(model).values())) > 1
    model.save_pretrained(tmp_path)
    assert sum(t.numel()*t.element_size() for t in load_file(tmp_path/"adapter_model.safetensors").values()) == adapter_bytes(model)
    base, _ = load_model(BASE, "nf4", device="cpu")
    again = load_adapter(base, tmp_path) if gate == "rank" else peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(*(score_captions(m, tokenizer, clips[:4], captions[:4]) for m in (model, again)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [2, 6])
def test_a_pruned_run_that_was_stopped_equals_an_uninterrupted_one(training, stop, tmp_path):
    def go(checkpoint, stop=None):
        config = run("prune", steps=8)
        model, tokenizer = built(training, config)
        log = fit(Trainer(model, tokenizer, *training, config), checkpoint, every=2, stop=stop)
        return log["loss"], trained_tensors(model)
    loss, whole = go(tmp_path/"a.safetensors")
    go(tmp_path/"b.safetensors", stop)
    after, resumed = go(tmp_path/"b.safetensors")
    assert after == loss and whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    again, finished = go(tmp_path/"b.safetensors")                       # a finished run, read once more
    assert again == loss and all(torch.equal(whole[n], finished[n]) for n in whole)


def test_ranks_by_module_reach_the_layers_with_their_scaling(training):
    base, _ = load_model(BASE, "none", device="cpu")
    names = [n for ms in linears(base).values() for n in ms]
    asked = {n: 1 + i % 5 for i, n in enumerate(names)}
    model = peft.get_peft_model(base, peft.LoraConfig(**rank_settings(base, asked, 3.)))
    assert ranks_in(model) == asked and {m.scaling["default"] for m in lora_layers(model).values()} == {3.}
    audit(model, asked)
    with pytest.raises(InputError, match=re.escape(f"{names[0]} has rank 1, asked for 7")): audit(model, asked | {names[0]: 7})
