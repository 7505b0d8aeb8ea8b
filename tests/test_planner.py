"The planner: an imagined step counts what a real one holds, settings that fit are found, what does not fit is said before training."
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from typer.testing import CliRunner

from mmqlora.benchmark import ARCHITECTURES, build_model, config_of, make_batch, name_of, pulse_cells, set_up
from mmqlora.cli import app
from mmqlora.core import InputError, read_json, repo_path
from mmqlora.ledger import counted, held
from mmqlora.planner import CANDIDATES, Calibration, Setting, calibrate, fits_or_raise, operations, plan, predict_cost, timed

SMALL = config_of("qwen2.5-vl-7b", small=True)


def setting(frames=8, **more): return Setting(frames=frames, side=56, **more)


KNOWN = ("smolvlm", "idefics", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3", "video_llava", "llava_onevision", "internvl")


def real_step(config, way, side):
    "(model, loss, batch) of a step on the CPU."
    model = build_model(config, "cpu", torch.float32, quantization="none")
    return model, set_up(model, way)[0], make_batch(model, 4, "cpu", torch.float32, side)


@pytest.mark.parametrize("family", KNOWN)
def test_operations_are_those_that_pytorch_counts(family):
    side = 64 if family == "qwen3_vl" else 56
    _, loss, batch = real_step(tiny_models.config(family), "stock_labels", side)
    with FlopCounterMode(display=False) as real: loss(batch).backward()
    planned = predict_cost(tiny_models.config(family), Setting(4, way="stock_labels", quantization="none", side=side))
    assert planned.flops == pytest.approx(real.get_total_flops(), rel=.02)


@pytest.mark.parametrize("family", KNOWN)
def test_operations_of_our_step_are_those_of_a_real_one(family):
    side = 64 if family == "qwen3_vl" else 56
    model, loss, batch = real_step(tiny_models.config(family), "ours", side)
    with counted() as real: loss(batch).backward()
    text, blocks = model.config.get_text_config(), int(model._mmqlora.done["blocks"].split()[0])
    again = blocks*4*text.hidden_size*batch["input_ids"].shape[1]**2                      # without a flash kernel, attention runs once more for its gradient
    planned = predict_cost(tiny_models.config(family), Setting(4, quantization="none", side=side))
    assert planned.flops == pytest.approx(real.flops - again, rel=.02)


def sdpa_of_torch_2_11(q, k, v, *args, out_val=None, **kwargs):
    "PyTorch's formula before it knew grouped heads: it refuses them."
    assert q.shape[:2] == k.shape[:2] == v.shape[:2], "sdpa_flop_count: query/key/value shapes are incompatible"
    return 4*q.shape[0]*q.shape[1]*q.shape[2]*k.shape[2]*q.shape[3]


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_grouped_heads_are_counted_whatever_this_torch_knows_of_them(heads, monkeypatch):
    monkeypatch.setitem(flop_registry, FORWARD, sdpa_of_torch_2_11)
    monkeypatch.setitem(flop_registry, BACKWARD, lambda grad, *args, **kwargs: sdpa_of_torch_2_11(*args, **kwargs)*5//2)
    q, k, v = (torch.zeros(1, h, 6, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, heads, heads))
    with counted(imagined=True) as c: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    assert c.flops == 3.5*4*4*6*6*8 and k.grad.shape == k.shape                             # two products forward, five backward, for each head of the queries


def test_a_family_whose_inputs_are_unknown_is_an_error():
    with pytest.raises(InputError, match="its inputs are not known to the planner"): predict_cost(tiny_models.config("instructblipvideo"), Setting(4))


def test_bytes_are_those_of_the_parts():
    p = predict_cost(SMALL, setting())
    model = build_model(SMALL, "cpu", torch.bfloat16)
    set_up(model, "ours", embeddings="keep")
    with counted() as real: real.hold(held(model))
    words = model.get_input_embeddings().weight
    assert p.resident == pytest.approx(real.now - words.numel()*words.element_size(), rel=.02)
    assert p.optimizer == 12*sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert p.peak == p.resident + p.optimizer + p.activations and p.activations > 0


def test_more_frames_and_ranks_need_more_and_each_candidate_needs_less():
    peaks = [predict_cost("qwen2-vl-2b", Setting(8, **c)).peak for c in CANDIDATES]
    assert all(a >= b for a, b in zip(peaks, peaks[1:])) and peaks[1] > peaks[3] > peaks[4]
    assert predict_cost(SMALL, setting(16)).peak > predict_cost(SMALL, setting(8)).peak
    assert predict_cost(SMALL, setting(rank=32)).peak > predict_cost(SMALL, setting(rank=4)).peak
    assert predict_cost(SMALL, setting(way="stock")).peak > predict_cost(SMALL, setting()).peak


def test_a_seven_billion_model_is_planned_without_its_weights():
    p = predict_cost("qwen2.5-vl-7b", Setting(frames=32, head="stream", offload=True))
    assert p.tokens == 2432 and 4.5 < p.peak/2**30 < 5.5 and 90e12 < p.flops < 120e12


def test_the_error_names_the_nearest_setting_that_fits_and_it_does_fit():
    least = replace(setting(64), **CANDIDATES[-1])
    memory = predict_cost(SMALL, least).peak - 1
    with pytest.raises(InputError, match="64 frames need .* the nearest that fits: 6[02] frames"): plan(SMALL, memory, frames=64, rank=16, side=56)
    best = plan(SMALL, memory, rank=16, side=56)
    assert best.peak <= memory < predict_cost(SMALL, replace(best.setting, frames=best.setting.frames + 2)).peak
    with pytest.raises(InputError, match="the nearest that fits: 62 frames"): fits_or_raise(SMALL, setting(64), memory)
    assert fits_or_raise(SMALL, least, memory + 1).peak == memory + 1


def test_where_the_rank_is_free_a_smaller_one_is_chosen_before_the_frames_are_given_up():
    memory = predict_cost(SMALL, replace(setting(8), **CANDIDATES[-1])).peak - 1
    assert plan(SMALL, memory, frames=8, side=56).setting.rank < 16


def test_one_calibration_gives_seconds():
    p = predict_cost(SMALL, setting())
    bound, card = Calibration().seconds(p), Calibration(call=0.).seconds(p)
    slow = calibrate(p, 2*bound)                                                            # a model this small waits for the host
    assert slow.seconds(p) == pytest.approx(2*bound) and slow.call == pytest.approx(50e-6, rel=.01) and slow.factor == 1
    large = replace(p, flops=10**15)
    late = calibrate(large, 1.5)                                                            # this one for the card
    assert late.seconds(large) == pytest.approx(1.5) and late.call == 25e-6 and late.factor == pytest.approx(1.5/Calibration(call=0.).seconds(large))
    assert card < bound < Calibration(call=50e-6).seconds(p) < 2.01*bound


def test_host_and_card_hide_each_other_only_as_far_as_a_stream_holds_launches():
    step = predict_cost("qwen2-vl-2b", Setting(8, way="stock_labels"))
    assert len(step.sent) == step.launches//1024 > 2
    assert all(a <= b for before, after in zip(step.sent, step.sent[1:]) for a, b in zip(before, after))
    assert step.sent[-1] <= (step.calls, step.flops, step.moved)
    host, card, together = (Calibration(flops=f, bytes=b, call=c).seconds(step) for f, b, c in ((1e30, 1e30, 25e-6), (790e12, 3e11, 0.), (790e12, 3e11, 25e-6)))
    assert max(host, card) < together < host + card


def test_the_command_line_plans(tmp_path):
    SMALL.save_pretrained(tmp_path)
    run = lambda *args: CliRunner().invoke(app, ["plan", str(tmp_path), "--side", "56", *args])
    good = run("--frames", "8", "--memory", "1GiB")
    assert good.exit_code == 0 and "peak" in good.output and "16-bit weights" in good.output
    bad = run("--frames", "8", "--memory", "100MiB")
    assert bad.exit_code == 1 and "memory:" in bad.stderr
    assert "GiB or MiB" in run("--memory", "much").stderr
    slow = run("--frames", "8", "--memory", "1GiB", "--timed", "8:stock_labels:60000")
    assert slow.exit_code == 0 and "H100" in good.output and "H100" not in slow.output and int(re.search(r"about (\d+) ms", slow.output)[1]) > 1000
    assert "frames:way:milliseconds" in run("--memory", "1GiB", "--timed", "fast").stderr


RECORD = read_json(repo_path("results/efficiency.json"))
MEASURED = {row["cell"]: row for row in RECORD["predictions"] if row["measured_peak"]}


def test_peaks_on_the_gpu_were_predicted_within_5_percent():
    assert len(MEASURED) >= 20
    off = {n: row["peak"]/row["measured_peak"] - 1 for n, row in MEASURED.items()}
    assert max(map(abs, off.values())) < .05, sorted(off.items(), key=lambda item: -abs(item[1]))[:3]


HOST = {"step/qwen2.5-vl-7b/head_host/32", "step/qwen2.5-vl-7b/stock/64", "repeat/qwen2.5-vl-7b/stock_labels/32/s19-2"}        # the table of targets says so: `planner, worst time` is not met; the last is the calibrating step once more


def test_after_one_calibration_a_lease_the_time_of_steps_is_predicted_within_25_percent_but_for_three_that_wait_for_the_host():
    rows = timed([row for row in MEASURED.values() if row["fast_ms"]])
    off = {row["cell"]: row["predicted_ms"]/row["fast_ms"] - 1 for row in rows if not row["calibrates"]}
    assert len({row["lease"] for row in rows}) == sum(row["calibrates"] for row in rows) >= 4                # no step is without a calibration
    assert len(off) == len(rows) - sum(row["calibrates"] for row in rows) >= 70
    assert {cell for cell, part in off.items() if abs(part) >= .25} == HOST
    one = {row["lease"]: row for row in rows if row["calibrates"]}
    for row in (row for row in rows if row["cell"] in HOST):                                # their host needed another time per operation than that of the run that calibrates
        ours, theirs = (r["fast_ms"]/r["calls"] for r in (row, one[row["lease"]]))
        assert abs(theirs/ours - 1) > .25 and row["fast_ms"] > 2*1000*Calibration(call=0.).seconds(SimpleNamespace(**row))


def test_at_the_pulse_of_its_host_every_mean_step_is_predicted_within_25_percent_and_nearly_so_whichever_step_calibrates():
    rows = [row for row in MEASURED.values() if "mean_pulse_ms" in row]
    assert len(rows) >= 25 and {(r["cell"].split("/")[2], r["cell"].split("/")[3]) for r in rows} >= {("stock", "64"), ("head_host", "32")}       # missed where no pulse was felt
    off = {row["cell"]: row["paced_ms"]/row["mean_step_ms"] - 1 for row in timed(rows) if not row["calibrates"]}
    assert len(off) >= 25 and max(map(abs, off.values())) < .2
    for one in rows:
        others = [row | dict(cell="step/m/other/0") for row in rows if row["lease"] == one["lease"] and row is not one]
        found = timed([one | dict(cell="step/m/stock_labels/0"), *others])[1:]
        off |= {(one["cell"], n): row["paced_ms"]/row["mean_step_ms"] - 1 for n, row in enumerate(found)}
    assert len(off) >= 300 and max(map(abs, off.values())) < .3 and sum(abs(part) >= .25 for part in off.values()) <= .01*len(off), sorted(off.items(), key=lambda item: -abs(item[1]))[:5]


def test_settings_that_the_planner_was_not_made_with_are_predicted_within_25_percent_by_either_reading():
    "Lease s19-2 measured them with the code that predicts them (a20ad56)."
    names = {name_of(cell) for cell in pulse_cells()[1:12]}
    rows = [row for row in MEASURED.values() if row["cell"] in names]
    assert len(rows) == 11 and {row["lease"] for row in rows} == {"s19-2"}
    assert max(abs(row[predicted]/row[measured] - 1) for row in rows for predicted, measured in (("predicted_ms", "fast_ms"), ("paced_ms", "mean_step_ms"))) < .25


def test_a_lease_without_a_step_to_calibrate_on_promises_no_time():
    row = lambda cell, lease: dict(cell=cell, lease=lease, flops=10**10, moved=10**6, calls=500, sent=[], fast_ms=15.)
    rows = timed([row("step/m/stock_labels/32", "a"), row("step/m/ours/32", "a"), row("step/m/ours/32", "b")])
    assert [(r["calibrates"], r["predicted_ms"]) for r in rows] == [(True, 15.), (False, 15.), (False, None)]


def test_at_full_size_operations_are_those_that_pytorch_counts():
    setting = Setting(16, way="ours")
    assert predict_cost("qwen2-vl-2b", setting).flops == pytest.approx(operations("qwen2-vl-2b", setting), rel=.02)
    rows = [row for row in RECORD["operations"] if row["counted"]]                         # `check_operations`, minutes each
    assert {row["cell"].split("/")[0] for row in rows} >= set(ARCHITECTURES) - {"video-llama3-7b"} and {row["cell"].split("/")[1] for row in rows} >= {"stock_labels", "ours"}
    assert max(abs(row["planned"]/row["counted"] - 1) for row in rows) < .02


def test_operations_counted_on_a_gpu_were_predicted_within_2_percent():
    rows = [row for row in MEASURED.values() if row["measured_flops"]]
    assert rows and max(abs(row["flops"]/row["measured_flops"] - 1) for row in rows) < .02
