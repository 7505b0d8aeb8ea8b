"The paper: prose is ours, numbers are the pipeline's."
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import spearmanr

from mmqlora.core import read_json
from mmqlora.report import LEARNED, LEASES, SHOWN, WORDS, base_hash_of, by_corruption, check_keys, diverged, leases_before, load_lease

PAPER = ROOT/"paper"
SECTIONS = sorted((PAPER/"sections").glob("*.tex"))
TEXT = {p.stem: re.sub(r"(?<!\\)%.*", "", p.read_text()) for p in SECTIONS}
ALL = "\n".join(TEXT.values()) + (PAPER/"main.tex").read_text()


@pytest.mark.parametrize("section", TEXT)
def test_a_section_types_no_result(section):
    prose = re.sub(r"\\(val|ref|label|cite|run|input|tabinput|figinput|includegraphics|bibitem|url|texttt)(\[[^]]*\])?\{[^}]*\}", "", TEXT[section])
    prose = re.sub(r"Qwen2\.5-VL|SmolLM2-\w+|Python 3\.\d+", "", prose)
    assert not re.search(r"\d+\.\d+|\d+\s*(\\,|~)?\s*(\\%|percent|points?\b|GiB|MiB|GB|MB|KiB|ms\b)", prose)
    assert not re.search(r"\b(TODO|TBD|FIXME|lorem)\b", prose, re.I)


def test_every_value_table_and_figure_exists(): assert check_keys(PAPER) == []


def test_no_value_is_defined_twice():
    keys = re.findall(r"\\defval\{([^}]*)\}", (PAPER/"generated/macros.tex").read_text())
    assert keys and len(set(keys)) == len(keys)


def test_a_missing_value_would_be_found(tmp_path):
    (tmp_path/"sections").mkdir()
    (tmp_path/"generated").mkdir()
    (tmp_path/"main.tex").write_text("\\val{qlora.test.exact} \\tabinput{none} \\figinput{none}")
    (tmp_path/"generated/macros.tex").write_text("\\defval{lora.test.exact}{0.5}\n")
    assert len(check_keys(tmp_path)) == 3


def test_references_labels_and_citations_resolve():
    labels = re.findall(r"\\label\{([^}]*)\}", ALL)
    assert len(set(labels)) == len(labels)
    assert set(re.findall(r"\\(?:eq)?ref\{([^}]*)\}", ALL)) <= set(labels)
    known = set(re.findall(r"^@\w+\{([^,]+),", (PAPER/"refs.bib").read_text(), re.M))
    cited = {k.strip() for group in re.findall(r"\\cite\{([^}]*)\}", ALL) for k in group.split(",")}
    assert cited <= known and not known - cited


def test_all_sections_are_in_the_paper():
    assert {p.stem for p in SECTIONS} == set(re.findall(r"\\input\{sections/(\w+)\.tex\}", (PAPER/"main.tex").read_text()))


# What the text says without a number, by key of generated/macros.tex: it must be rewritten if new results say otherwise.
TIERS = ("", "gpu.")
CONTROLS = ("qlora-uniform-k4", "tqlora-constant", "tqlora-shuffled", "tqlora-random", "tqlora-energy")
AHEAD = [f"diff.{pair}" for pair in ("qlora-cover-k4.qlora-uniform-k4.exact", "qlora-cover-k4.qlora-uniform-k4.transient", "qlora-k4.qlora-uniform-k4.exact",
                                     "qlora.qlora-text.exact", *(f"tqlora.{control}.exact" for control in CONTROLS))]
NOT_AHEAD = ["diff.qlora-gradient.qlora.exact", "diff.qlora-joint.qlora.exact", "diff.qlora-eva.qlora.exact", "diff.qlora-entropy-ranks.qlora.exact",
             "diff.qlora-k16.qlora.exact", "gpu.diff.qlora-joint.qlora.exact", "gpu.diff.qlora-r64.qlora-r16.exact",
             "gpu.diff.qlora-eva.qlora.exact", "gpu.diff.qlora-entropy-ranks.qlora.exact"]
OPEN = ["gpu.diff.tqlora.tqlora-time.exact", "gpu.diff.qdora.qlora.exact", "diff.qlora-large.qlora.exact"]
UNSETTLED = ["gpu.diff.qlora.lora.exact", "gpu.diff.qlora-gradient.qlora.exact", "gpu.diff.qlora-r16.qlora.exact", "gpu.diff.qlora.qlora-uniform.exact", "gpu.diff.all-k4.tqlora-cover.exact"]     # over clips and seeds, whatever the registered test says
GREATER = [                                           # the first value above the second
    *((f"{t}diff.qlora-cover-k4.qlora-uniform-k4.transient", f"{t}diff.qlora-cover-k4.qlora-uniform-k4.exact") for t in TIERS),
    *((f"{t}diff.tqlora.qlora-uniform-k4.transient", f"{t}diff.tqlora.qlora-uniform-k4.exact") for t in TIERS),
    *((f"{t}tqlora-cover.test.exact", f"{t}qlora-cover-k4.test.exact") for t in TIERS),
    *((f"{t}diff.tqlora.qlora-uniform-k4.exact", f"{t}diff.tqlora-k2.qlora-uniform-k2.exact") for t in TIERS), ("tqlora.test.exact", "tqlora-scalar.test.exact"),
    ("gpu.diff.tqlora.qlora-uniform-k4.exact", "gpu.diff.qlora-cover-k4.qlora-uniform-k4.exact"), ("diff.qlora-cover-k4.qlora-uniform-k4.exact", "diff.tqlora.qlora-uniform-k4.exact"),
    *((f"{t}diff.qlora-d1600.qlora-d400.exact", f"{t}diff.qlora.qlora-d1600.exact") for t in TIERS),
    ("diff.qlora.qlora-uniform.exact", "diff.qlora-k4.qlora-uniform-k4.exact"),              # the gain of entropy shrinks with fewer frames ...
    ("gpu.diff.qlora-k4.qlora-uniform-k4.exact", "gpu.diff.qlora.qlora-uniform.exact"),      # ... and grows where half of them were seen
    ("qlora-uniform.test.exact", "qlora-random.test.exact"), ("qlora-r4.test.exact", "qlora-text.test.exact"),
    ("qlora-cover-k4.test.exact", "qlora-adaptive-k4.test.exact"), ("qlora-cover-k4.test.exact", "qlora-k4.test.exact"),
    ("diff.qlora.qlora-k4.exact", "diff.qlora-k4.qlora-k2.exact"), ("diff.qlora.qlora-k4.exact", "diff.qlora-k16.qlora.exact"),
    ("qlora-cover-k4.ood.exact", "tqlora-cover.ood.exact"), ("qlora.base.questions", "full.base.questions"),
    *(("gpu.all.test.exact", f"gpu.{run}.test.exact") for run in ("full", "bottleneck", "qdora", "tqlora-cover", "all-k4")), ("gpu.qlora.test.exact", "gpu.qlora-r2.test.exact"), ("gpu.diff.tqlora.tqlora-gradient.exact", "gpu.diff.tqlora.tqlora-time.exact"),
    ("gpu.diff.qlora-k4.qlora-k2.exact", "gpu.diff.qlora-k8.qlora-k4.exact"), ("gpu.diff.qlora-k8.qlora-k4.exact", "gpu.diff.qlora.qlora-k8.exact"), ("gpu.bottleneck.test.exact.most", "gpu.all.test.exact"),
    ("corruption.qlora-cover-k4.noise", "corruption.tqlora-cover.noise"), ("qlora-sound.test.sound", "qlora-deaf.test.sound"),
]


@pytest.fixture(scope="module")
def said():
    "key -> number, for every value that is one."
    text = (PAPER/"generated/macros.tex").read_text()
    return {key: float(value.replace(",", "")) for key, value in re.findall(r"\\defval\{([^}]*)\}\{(?:\$<\$)?(-?\d[\d,]*(?:\.\d+)?)\}", text)}


@pytest.fixture(scope="module")
def words():
    "key -> value as it is printed."
    return dict(re.findall(r"^\\defval\{([^}]*)\}\{(.*)\}$", (PAPER/"generated/macros.tex").read_text(), re.M))


@pytest.fixture(scope="module")
def leases():
    "name of a lease before that of results/gpu -> its records."
    return leases_before({name: load_lease(f"results/gpu-{name}") for name in LEASES}, load_lease("results/gpu"))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("key", AHEAD)
def test_what_the_text_calls_ahead_is_ahead_on_both_tiers(said, tier, key):
    assert said[tier + key] > 0 and said[f"{tier}{key}.padj"] < .05
    assert said[f"{tier}{key}.lo"] > 0            # over clips and seeds


@pytest.mark.parametrize("key", NOT_AHEAD)
def test_what_did_not_pay_did_not_pay(said, key): assert said[key] < .03 and (said[key] <= 0 or said[f"{key}.padj"] >= .05)


@pytest.mark.parametrize("key", OPEN)
def test_what_the_text_cannot_tell_apart_is_not_apart(said, key): assert abs(said[key]) < .03 and said[f"{key}.padj"] >= .05


@pytest.mark.parametrize("key", UNSETTLED)
def test_what_the_text_leaves_open_is_open_over_seeds(said, key): assert said[f"{key}.lo"] < 0 < said[f"{key}.hi"]


@pytest.mark.parametrize("key", ["diff.qlora.qlora-random.exact", "diff.qlora-r16.qlora-r2.exact", "diff.all.qlora.exact", "ood.tqlora-cover.qlora-cover-k4.exact"])
def test_what_the_text_says_of_the_tier_gpu_is_beyond_its_seeds(said, key): assert said[f"gpu.{key}.lo"] > 0


def test_out_of_domain_the_gate_on_covering_frames_gains_on_the_second_tier_alone(said): assert said["ood.tqlora-cover.qlora-cover-k4.exact.lo"] < 0


@pytest.mark.parametrize("tier", TIERS)
def test_under_noise_the_gate_loses_on_covering_frames_and_gains_nothing_on_uniform_ones(said, tier):
    assert said[f"{tier}ood.tqlora-cover.qlora-cover-k4.exact.noise.hi"] < 0
    assert said[f"{tier}ood.tqlora.qlora-uniform-k4.exact.noise.lo"] < 0 < said[f"{tier}ood.tqlora.qlora-uniform-k4.exact.noise.hi"]


def test_the_highest_mean_of_the_tier_gpu_is_that_of_all_three_together():
    means = {run: r["metrics"]["test.exact"]["value"] for run, r in load_lease("results/gpu").items()}
    assert max(means, key=means.get) == "all"


@pytest.mark.parametrize("tier", ["cpu", "gpu"])
def test_missed_transients_are_the_commonest_error_of_tuned_runs_that_learned(said, tier):
    "And captions with content errors are rare, but with adapters in the language model alone on the tier gpu."
    prefix = {"cpu": "", "gpu": "gpu."}[tier]
    for run, r in ((p.stem, read_json(p)) for p in (ROOT/f"results/{tier}").glob("*.json")):
        if min(r["metrics"]["test.exact"]["seeds"]) < LEARNED or f"{prefix}errors.{run}.n" not in said: continue
        n = {kind: said[f"{prefix}errors.{run}.{kind}"] for kind in ("content", "order", "transient", "event")}
        assert max(n, key=n.get) == "transient", run
        if run in SHOWN: assert (n["content"] < .05*said[f"{prefix}errors.{run}.n"]) == ((tier, run) != ("gpu", "qlora-text")), run


def test_a_fifth_of_the_errors_of_all_parts_together_on_the_tier_gpu_are_of_content(said):
    assert .18 < said["gpu.errors.all.content"]/said["gpu.errors.all.wrong"] < .22 and said["gpu.errors.all.wrong"] == min(said[f"gpu.errors.{run}.wrong"] for run in SHOWN if f"gpu.errors.{run}.wrong" in said)


def test_no_seed_of_the_tier_gpu_diverged_and_those_of_earlier_leases_are_told_by_lease(said):
    lost = {lease: {run for run in (p.stem for p in (ROOT/"results"/lease).glob("*.json")) if diverged(record(lease, run))} for lease in ("gpu", *(f"gpu-{name}" for name in LEASES))}
    assert lost == {"gpu": set(), "gpu-first": {"prefix"}, "gpu-second": {"qlora-r16", "qlora-r64", "qlora-gradient"}, "gpu-third": {"qlora-k8"}, "gpu-fourth": {"bottleneck"}} and said["gpu.lost"] == 0


def test_earlier_leases_repeat_what_this_one_decides(said, words):
    "And those of another sign have an interval around zero."
    assert said["again.n"] > said["again.same"] > said["again.distinct"] > 20 and said["again.sure"] > .85*said["again.n"]
    intervals = re.findall(r"\[(.*?), (.*?)\]", words["again.turned"].replace("$-$", "-"))
    assert len(intervals) == said["again.n"] - said["again.same"] == 6 and words["again.turned"].count("(") == 6 and words["again.turned"].split(r"\texttt{tqlora}")[0].count("(") == 5      # C1's come first
    assert all(float(low) < 0 < float(high) for low, high in intervals)


@pytest.mark.parametrize("key, sign", [("first.diff.bottleneck.qlora.exact", 1), ("second.diff.bottleneck.qlora.exact", 1)])
def test_what_the_text_says_that_earlier_leases_had_found(said, key, sign): assert said[f"again.{key}.{'lo' if sign > 0 else 'hi'}"]*sign > 0


def test_the_text_counts_the_leases_that_are_there(words, leases):
    assert (words["again.leases"], words["again.times"]) == (WORDS[len(leases)], WORDS[len(leases) + 1])
    assert {name for name in LEASES if words[f"again.{name}.runs"] != "0"} == set(leases)


def test_the_text_names_the_lease_that_chose_the_rates(words, leases):
    of = {base_hash_of(load_lease("results/gpu")): "the same lease"} | {base_hash_of(records): f"the {name} lease" for name, records in leases.items()}
    assert of[read_json(ROOT/"results/gpu-tune.json")["base_hash"]] == words["gpu.tuned"]


def test_the_runs_of_the_tier_gpu_are_of_three_machines_of_one_card_or_two():
    made = [how for record in load_lease("results/gpu").values() for how in record.get("by_seed", {0: record}).values()]
    assert len({how["commit"] for how in made}) == 3 and {how["hardware"]["gpus"] for how in made} == {1, 2}


def test_the_tier_gpu_has_all_of_its_runs_and_all_seeds_of_each(words, said): assert words["gpu.missing"] == "none" and said["gpu.fewest"] == said["gpu.seeds"] == 5


@pytest.mark.parametrize("claim, against", [("C6", True), ("C9", False), ("C11", False)])
def test_what_earlier_leases_had_decided_against_is_decided_so_here_for_rivals_alone(words, claim, against): assert (words[f"verdict.{claim}.gpu"] == "against") == against


def test_seeds_of_earlier_leases_diverged_at_the_rates_that_the_text_has():
    def rate(lease, run): return record(lease, run)["config"]["lr"]
    late = [rate("gpu-second", run) for run in ("qlora-r16", "qlora-r64", "qlora-gradient")] + [rate("gpu-third", "qlora-k8")]
    assert set(late) == {2*rate("gpu", "lora")} and rate("gpu-first", "prefix") < rate("gpu", "prefix") and rate("gpu-fourth", "bottleneck") == rate("gpu", "bottleneck")


def tried(run, field):
    "value -> the losses of the seeds it was tried with, on the tier gpu."
    trials = [t for t in read_json(ROOT/"results/gpu-tune.json")["trials"] if t["run"] == run]
    return {value: [t["loss"] for t in trials if t[field] == value] for value in sorted({t[field] for t in trials})}


def test_gate_and_input_have_the_highest_multiples_of_their_grids_where_the_loss_still_fell():
    for run in ("tqlora", "qlora-signals"):
        losses = [np.mean(found) for found in tried(run, "gate_lr").values()]              # by value, from the lowest
        assert losses == sorted(losses, reverse=True) and record("gpu", run)["config"]["gate_lr"] == max(tried(run, "gate_lr"))


def test_most_rates_of_the_tier_gpu_lie_at_the_edge_of_their_grid():
    made = read_json(ROOT/"results/gpu-tune.json")
    edge = [made["chosen"][key][field] in (min(grid), max(grid)) for run, fields in made["config"]["grid"].items() for field, grid in fields.items() for key in ({"tqlora": "gated"}.get(run, run),)]
    assert len(edge) == 9 and sum(edge) > len(edge)/2


def test_the_gain_of_the_gate_in_earlier_leases_is_between_those_of_the_fourth_and_the_second_and_below_that_of_this(said):
    gain = {name: said[f"again.{name}.diff.tqlora.qlora-uniform-k4.exact"] for name in LEASES if f"again.{name}.diff.tqlora.qlora-uniform-k4.exact" in said}
    assert sorted(gain, key=gain.get) == ["fourth", "first", "second"] and max(gain.values()) < said["gpu.diff.tqlora.qlora-uniform-k4.exact"]


def test_stock_steps_and_those_that_count_differ_by_less_than_seeds_do():
    for run, exact in read_json(ROOT/"results/benchmarks/lean.json")["exact"]["runs"].items():
        assert exact["counts"] == record("gpu", run)["metrics"]["test.exact"]["seeds"]
        assert abs(np.mean(exact["counts"]) - np.mean(exact["stock"])) < max(np.ptp(exact["counts"]), np.ptp(exact["stock"])), run


def test_signals_as_input_have_the_multiple_of_least_loss():
    found, used = {v: np.mean(losses) for v, losses in tried("qlora-signals", "gate_lr").items()}, {lease: record(lease, "qlora-signals")["config"]["gate_lr"] for lease in ("gpu", "gpu-fourth")}
    assert used["gpu"] == min(found, key=found.get) == 8*used["gpu-fourth"]


def test_seeds_of_bottleneck_adapters_fall_into_two_groups_one_among_those_of_qlora():
    bottleneck, qlora = (sorted(record("gpu", run)["metrics"]["test.exact"]["seeds"]) for run in ("bottleneck", "qlora"))
    assert qlora[0] < bottleneck[0] and bottleneck[1] < qlora[-1] < bottleneck[2] - .1


@pytest.mark.parametrize("more, less", GREATER)
def test_the_text_has_the_order_of_the_values(said, more, less): assert said[more] > said[less]


def test_selection_keeps_its_gain_out_of_domain(said):
    for tier in TIERS: assert said[f"{tier}ood.qlora-cover-k4.qlora-uniform-k4.exact.lo"] > 0


@pytest.mark.parametrize("run", ["qlora-cover", "qlora-cover-k4", "qlora-cover-k2"])
def test_captions_hardly_notice_merging(said, run): assert abs(said[f"merged.{run}.merged.exact"] - said[f"merged.{run}.beside.exact"]) < .02


def test_shuffling_takes_most_of_exact_match(said): assert said["qlora.test.exact_disordered"] < said["qlora.test.exact"]/2


def test_the_frozen_base_hears_as_well(said): assert abs(said["diff.qlora-sound.zeroshot-sound.sound"]) < .02


def test_languages_of_the_tier_gpu_are_mostly_out_of_reach(said): assert said["gpu.qlora-tasks.test.languages"] < .05 and said["gpu.full-tasks.test.languages"] < .2


def record(tier, run): return read_json(ROOT/"results"/tier/f"{run}.json")


@pytest.mark.parametrize("tier", ["cpu", "gpu"])
def test_noise_undoes_the_gate_and_nothing_captions_the_dark(tier):
    runs = {run: record(tier, run) for run in ("qlora", "tqlora-cover", "qlora-cover-k4", "tqlora", "qlora-uniform-k4")}
    clean = {run: r["metrics"]["test.exact"]["value"] for run, r in runs.items()}
    damaged = {run: by_corruption(r) for run, r in runs.items()}
    assert max(exact["brightness"] for exact in damaged.values()) < .05
    assert damaged["tqlora-cover"]["noise"] < damaged["qlora-cover-k4"]["noise"]
    assert damaged["tqlora"]["noise"] - damaged["qlora-uniform-k4"]["noise"] < (clean["tqlora"] - clean["qlora-uniform-k4"])/2


def directions(tier, run):
    "(module, its singular values) by name, of the committed record."
    found = record(tier, run)["spectra"]
    return {name: np.array(values) for modules in found.values() for name, values in modules.items()}, {name: m for m, modules in found.items() for name in modules}


@pytest.mark.parametrize("tier, loosely", [("cpu", .6), ("gpu", .3)])
def test_why_allocation_did_not_pay(tier, loosely):
    wide, modality = directions(tier, "qlora-r16")
    kept = {name: (values[:8]**2).sum()/(values**2).sum() for name, values in wide.items()}
    for part in set(modality.values()): assert np.mean([kept[name] for name in kept if modality[name] == part]) > .95

    def used(values): return np.exp(-(values/values.sum()*np.log(values/values.sum() + 1e-12)).sum())
    given = directions(tier, "qlora-gradient")[0]
    ranks, needed = [len(given[name]) for name in wide], [used(values) for values in wide.values()]
    assert np.std(ranks) > 0 and abs(spearmanr(ranks, needed).statistic) < loosely
