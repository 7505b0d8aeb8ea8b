"The planner: an imagined step counts what a real one holds, settings that fit are found, what does not fit is said before training."
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mmqlora.benchmark import build_model, config_of, make_batch, set_up
from mmqlora.cli import app
from mmqlora.core import InputError
from mmqlora.ledger import counted, held
from mmqlora.planner import CANDIDATES, Calibration, Setting, calibrate, fits_or_raise, plan, predict

SMALL = config_of("qwen2.5-vl-7b", small=True)


def setting(frames=8, **more): return Setting(frames=frames, side=56, **more)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen2-vl-2b", "video-llama3-7b", "idefics-9b"])
@pytest.mark.parametrize("way", ["stock", "ours"])
def test_an_imagined_step_counts_the_operations_of_a_real_one(name, way):
    config = config_of(name, small=True)
    model = build_model(config, "cpu", torch.float32)
    loss, _ = set_up(model, way)
    batch = make_batch(model, 4, "cpu", torch.float32, side=56)
    with counted() as real: loss(batch).backward()
    assert predict(config, setting(4, way=way)).flops == pytest.approx(real.flops, rel=.08)             # on a CPU attention runs once more


def test_bytes_are_those_of_the_parts():
    p = predict(SMALL, setting())
    model = build_model(SMALL, "cpu", torch.bfloat16)
    set_up(model, "ours", embeddings="keep")
    with counted() as real: real.hold(held(model))
    words = model.get_input_embeddings().weight
    assert p.resident == pytest.approx(real.now - words.numel()*words.element_size(), rel=.02)
    assert p.optimizer == 12*sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert p.peak == p.resident + p.optimizer + p.activations and p.activations > 0


def test_more_frames_and_ranks_need_more_and_each_candidate_needs_less():
    peaks = [predict("qwen2-vl-2b", Setting(8, **c)).peak for c in CANDIDATES]
    assert peaks[0] > peaks[1] > peaks[2] >= peaks[3]
    assert predict(SMALL, setting(16)).peak > predict(SMALL, setting(8)).peak
    assert predict(SMALL, setting(rank=32)).peak > predict(SMALL, setting(rank=4)).peak
    assert predict(SMALL, setting(way="stock")).peak > predict(SMALL, setting()).peak


def test_a_seven_billion_model_is_planned_without_its_weights():
    p = predict("qwen2.5-vl-7b", Setting(frames=32, head="stream", offload=True))
    assert p.tokens == 2432 and 4.5 < p.peak/2**30 < 5.5 and 90e12 < p.flops < 120e12


def test_the_error_names_the_nearest_setting_that_fits_and_it_does_fit():
    least = replace(setting(64), **CANDIDATES[-1])
    memory = predict(SMALL, least).peak - 1
    with pytest.raises(InputError, match="64 frames need .* the nearest that fits: 6[02] frames"): plan(SMALL, memory, frames=64, side=56)
    best = plan(SMALL, memory, side=56)
    assert best.peak <= memory < predict(SMALL, replace(best.setting, frames=best.setting.frames + 2)).peak
    with pytest.raises(InputError, match="the nearest that fits: 62 frames"): fits_or_raise(SMALL, setting(64), memory)
    assert fits_or_raise(SMALL, least, memory + 1).peak == memory + 1


def test_one_calibration_gives_seconds():
    p = predict(SMALL, setting())
    card = calibrate(p, 2*Calibration().bound(p))
    assert card.factor == pytest.approx(2) and card.seconds(p) == pytest.approx(2*Calibration().bound(p))


def test_the_command_line_plans(tmp_path):
    SMALL.save_pretrained(tmp_path)
    run = lambda *args: CliRunner().invoke(app, ["plan", str(tmp_path), "--side", "56", *args])
    good = run("--frames", "8", "--memory", "1GiB")
    assert good.exit_code == 0 and "peak" in good.output and "16-bit weights" in good.output
    bad = run("--frames", "8", "--memory", "100MiB")
    assert bad.exit_code == 1 and "memory:" in bad.stderr
    assert "GiB or MiB" in run("--memory", "much").stderr
