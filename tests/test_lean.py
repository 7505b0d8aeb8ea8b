"The lean forward passes of the default tier against those of transformers, peft and bitsandbytes."
import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit

import mmqlora.lean as lean_room
from mmqlora import train
from mmqlora.adapters import adapt
from mmqlora.core import repo_path
from mmqlora.lean import ON_GPU, dense_weight, lean
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


def on_gpu(model): return lean(model, parts=ON_GPU)


@pytest.mark.parametrize("change", [{}, {"method": "lora"}, {"method": "qdora"}, {"gate": "rank", "gate_lr": 5.}, {"gate": "gradient"}, {"gate": "input", "gate_lr": 5.}, {"ranks": {"text": 4}},
                                    {"allocation": "prune", "budget_rank": 2}])
def test_the_parts_for_a_gpu_take_the_same_road_under_autocast(training, short, monkeypatch, change):
    stock, ours = (trainer(training, short.model_copy(update=change), monkeypatch, how) for how in (lambda m: m, on_gpu))
    for t in (stock, ours): mixed_precision(base_of(t.model), "cpu")
    losses = [[t.step(n) for n in range(6)] for t in (stock, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[1][-1] < losses[1][0]
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.trained)
    write_captions(ours.model, ours.tokenizer, training[0][:2])


@pytest.mark.parametrize("change", [{}, {"method": "qdora"}])
def test_what_the_parts_for_a_gpu_are_expected_to_need_can_be_imagined(training, short, monkeypatch, change):
    "The check before training, with 16-bit copies of what is frozen."
    t = trainer(training, short.model_copy(update=change), monkeypatch, on_gpu)
    mixed_precision(base_of(t.model), "cpu")
    t.step(0)
    frames = t.clips.pixels.shape[1]
    assert 0 < t.need(1, frames) < t.need(4, frames)


def logits(model, clips):
    batch = dict(input_ids=torch.tensor([[1, *[base_of(model).config.image_token_id]*4, 70, 71]]), pixel_values=clips.pixels[:1, :1].float()/255)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): return model.eval()(**batch).logits.float()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_was_merged_is_what_the_next_adapter_adds_to(training, short, monkeypatch, method):
    "Copies for a GPU are of weights in 32 bits too, which peft changes where they lie."
    t = trainer(training, short.model_copy(update={"method": method, "lr": 3e-2}), monkeypatch, on_gpu)
    logits(t.model, training[0])                                       # makes copies
    for n in range(3): t.step(n)
    plain = t.model.merge_and_unload()
    wanted = logits(copy.deepcopy(plain), training[0])
    again = adapt(plain, method, {"vision": 2, "fusion": 2, "text": 2})
    assert torch.allclose(logits(again, training[0]), wanted, atol=.1, rtol=.05)


def test_a_model_that_was_asked_before_can_learn(training, short, monkeypatch):
    t = trainer(training, short.model_copy(update={"gate": "gradient"}), monkeypatch, on_gpu)
    with torch.inference_mode(): t.loss(t.batch(0))
    assert t.step(0) > 0


def test_base_weights_that_are_trained_get_their_gradients(training, short, monkeypatch):
    t = trainer(training, short.model_copy(update={"method": "lora"}), monkeypatch, lean)
    bases = [m.base_layer for m in t.model.modules() if hasattr(m, "lora_A")]
    for base in bases: base.weight.requires_grad_()
    t.loss(t.batch(0)).backward()
    assert all(base.weight.grad is not None and base.weight.grad.any() for base in bases)


def test_copies_are_kept_on_a_gpu_only_while_they_are_small(training, short, monkeypatch):
    kept = lambda model: sum("dense" in vars(m) for m in model.modules())
    assert kept(trainer(training, short, monkeypatch, on_gpu).model) and not kept(trainer(training, short, monkeypatch, lambda m: lean(m, False, ON_GPU)).model)
    monkeypatch.setattr(lean_room, "COPIES", 2**10)
    assert not kept(trainer(training, short, monkeypatch, on_gpu).model) and kept(trainer(training, short, monkeypatch, lean).model)


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


def test_weights_that_evaluation_packed_for_the_cpu_are_read_right():
    "bitsandbytes orders them anew where a CPU has AVX512-BF16; here as it would, whatever this one has."
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4").to("cpu")
    wanted = dense_weight(linear).clone()
    linear.weight.data, linear.weight.quant_state = _convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    assert linear.weight.quant_state.packing_format_for_cpu
    assert torch.allclose(dense_weight(linear), wanted, atol=.02)      # packing rounds the scales to bfloat16


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
