"The lean forward passes of the default tier against those of transformers, peft and bitsandbytes."
import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from mmqlora import train
from mmqlora.core import repo_path
from mmqlora.lean import LEAN, ON_GPU, dense_weight, lean
from mmqlora.lifecycle import merge
from mmqlora.model import base_of, mixed_precision
from mmqlora.predict import score_captions, score_galleries, write_captions
from mmqlora.ranks import storage_bytes


def trainer(training, config, monkeypatch, how):
    monkeypatch.setattr(train, "lean", how)
    clips, captions = training
    model, tokenizer = train.build(repo_path("models/base"), config, 0, device="cpu", calibration=training)
    return train.Trainer(model.train(), tokenizer, clips, captions, config, 0)


@pytest.mark.parametrize("change", [{}, {"gate": "rank", "gate_lr": 5.}, {"gate": "gradient"}, {"gate": "rank", "quantization": "int8"}, {"method": "full", "lr": 1e-3}, {"quantization": "int8"},
                                    {"method": "qdora"}, {"allocation": "prune", "budget_rank": 2}])
def test_training_takes_the_same_road(training, short, monkeypatch, change):
    config = short.model_copy(update=change)
    stock, ours = (trainer(training, config, monkeypatch, how) for how in (lambda m: m, lean))
    losses = [[t.step(n) for n in range(6)] for t in (stock, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    wanted, got = (dict(t.model.named_parameters()) for t in (stock, ours))
    assert list(wanted) == list(got)                                   # the same names in files


@pytest.mark.parametrize("change", [{}, {"method": "lora"}, {"gate": "rank", "gate_lr": 5.}, {"gate": "gradient"}, {"gate": "input", "gate_lr": 5.}, {"ranks": {"text": 4}}, {"allocation": "prune", "budget_rank": 2}])
def test_the_parts_for_a_gpu_take_the_same_road_under_autocast(training, short, monkeypatch, change):
    for kind in {*LEAN} - {*ON_GPU}: monkeypatch.delitem(LEAN, kind)
    for kind, mixin in ON_GPU.items(): monkeypatch.setitem(LEAN, kind, mixin)
    stock, ours = (trainer(training, short.model_copy(update=change), monkeypatch, how) for how in (lambda m: m, lean))
    for t in (stock, ours): mixed_precision(base_of(t.model), "cpu")
    losses = [[t.step(n) for n in range(6)] for t in (stock, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[1][-1] < losses[1][0]
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.trained)
    write_captions(ours.model, ours.tokenizer, training[0][:2])


def test_what_the_parts_for_a_gpu_are_expected_to_need_can_be_imagined(training, short, monkeypatch):
    "The check before training, with 16-bit copies of what is frozen."
    for kind, mixin in ON_GPU.items(): monkeypatch.setitem(LEAN, kind, mixin)
    t = trainer(training, short, monkeypatch, lean)
    mixed_precision(base_of(t.model), "cpu")
    t.step(0)
    frames = t.clips.pixels.shape[1]
    assert 0 < t.need(1, frames) < t.need(4, frames)


def test_evaluation_computes_in_the_precision_of_training(training, short, monkeypatch):
    "bitsandbytes on its own would change to bfloat16 on some processors."
    t = trainer(training, short, monkeypatch, lean)
    t.step(0)
    clips, captions = training
    batch = train.collate(t.tokenizer, clips, [ids for ids, in t.captions], t.tokens)
    t.model.train()
    with torch.no_grad(): loss = float(train.caption_loss(t.model, batch, "none").sum())
    t.model.eval()
    with torch.no_grad(): assert float(train.caption_loss(t.model, batch, "none").sum()) == loss


def test_scores_of_galleries_hold_those_of_true_captions(training, short, monkeypatch):
    t = trainer(training, short.model_copy(update={"gate": "rank"}), monkeypatch, lean)
    clips, captions = training
    in_galleries = score_galleries(t.model, t.tokenizer, clips, captions, ["a"]*8 + ["b"]*8, t.signals)
    alone = score_captions(t.model, t.tokenizer, clips, captions, t.signals)
    assert torch.allclose(in_galleries.diagonal(dim1=1, dim2=2).flatten(), alone, atol=1e-5)


def test_what_is_stored_stays_in_four_bits(training, short, monkeypatch):
    stock, ours = (trainer(training, short, monkeypatch, how).model for how in (lambda m: m, lean))
    before = storage_bytes(ours)
    write_captions(ours, trainer(training, short, monkeypatch, lean).tokenizer, training[0][:2])
    assert storage_bytes(ours) == before == storage_bytes(stock)


def test_a_copy_is_its_own(training, short, monkeypatch):
    t = trainer(training, short, monkeypatch, lean)
    t.step(0)
    clips, captions = training
    mine, other = score_captions(t.model, t.tokenizer, clips, captions), copy.deepcopy(t.model)
    for n, p in other.named_parameters():
        if "lora_B" in n: p.data.zero_()
    assert torch.equal(score_captions(t.model, t.tokenizer, clips, captions), mine)
    assert not torch.equal(score_captions(other, t.tokenizer, clips, captions), mine)


def test_merging_renews_dense_copies(training, short, monkeypatch):
    t = trainer(training, short, monkeypatch, lean)
    t.step(0)
    score_captions(t.model, t.tokenizer, *training)
    linears = [m for m in merge(t.model)[0].modules() if type(m).__name__ == "Linear4bit"]
    assert linears and all(torch.equal(dense_weight(m), dequantize_4bit(m.weight.data, m.weight.quant_state)) for m in linears)
