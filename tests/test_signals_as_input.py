"Frame signals as input: exactly QLoRA at the start, then read; the same under checkpointing, caches, beams and `lean`; saved, loaded, refused where it would be lost."
import copy

import peft
import pytest
import tiny_models
import torch
from test_temporal import close, loss_and_gradients, settings, signals

import mmqlora
from mmqlora.adapters import adapt, load_adapter
from mmqlora.core import InputError, repo_path
from mmqlora.lifecycle import export, merge
from mmqlora.lowmem import low_memory
from mmqlora.model import from_pretrained, linears, load_model
from mmqlora.predict import score_captions, write_captions
from mmqlora.ranks import adapter_bytes, adapter_tensors, audit, trainable
from mmqlora.temporal import TemporalLoraConfig, set_frame_signals, token_units, wire_gates
from mmqlora.train import Trainer, build, fit, make_optimizer, trained_tensors

BASE, TOLD = repo_path("models/base"), dict(gate="input", gate_lr=3.)
READERS = [f for f in tiny_models.FAMILIES if f != "idefics"]          # its visual tokens never enter the text model


def tiny(family="smolvlm", gate="input", scale=.3):
    "A tiny model with random B and, unless `gate` is none, a random map of its signals."
    model = tiny_models.build(family)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings(model)) if gate == "none" else TemporalLoraConfig(**settings(model), gate=gate))
    if gate != "none": wire_gates(model)
    return fill(model, scale)


def fill(model, scale=.3):
    g = torch.Generator().manual_seed(1)
    for n, p in sorted(model.named_parameters()):
        if "lora_B" in n: p.data = torch.randn(p.shape, generator=g)*.3
    for n, p in model.named_parameters():
        if "lora_input" in n: p.data = torch.randn(p.shape, generator=g)*scale
    return model


def logits(model, batch, z):
    set_frame_signals(model, z)
    with torch.no_grad(): return model(**batch).logits


@pytest.mark.parametrize("family", READERS)
def test_at_the_start_it_is_lora_to_the_bit_and_then_every_clip_reads_its_own_signals(family):
    ours, theirs, batch = tiny(family, scale=0.).eval(), tiny(family, "none").eval(), tiny_models.video_inputs(family)
    (one, grads), (two, plain) = loss_and_gradients(ours, batch, signals()), loss_and_gradients(theirs, batch)
    assert torch.equal(one, two) and all(torch.equal(grads[n], g) for n, g in plain.items())
    told = [n for n in grads if n not in plain]
    assert told == ["base_model.model.frame_input.lora_input.default"] and grads[told[0]].any()
    z = signals()
    before = logits(fill(ours), batch, z)
    after = logits(ours, batch, torch.stack([z[0], z[1].flip(0)]))
    assert torch.allclose(before[0], after[0], atol=1e-5) and not torch.allclose(before[1], after[1], atol=1e-4)
    with ours.disable_adapter(), theirs.disable_adapter(): assert torch.equal(logits(ours, batch, z), logits(theirs, batch, z))


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl", "llava_onevision"])
def test_what_enters_the_text_model_changes_at_the_tokens_of_the_frame_that_was_told(family):
    model, batch, seen, z = tiny(family).eval(), tiny_models.video_inputs(family), [], signals()
    base = model.get_base_model()
    base.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    other = z.clone()
    other[1, 2:] += 1.                                                  # both frames of a unit, where two make one
    for signal in (z, other): logits(model, batch, signal)
    unit, _ = token_units(base._frame_state.layout)
    per_unit = base._frame_state.layout.family.per_unit(base.config)
    first = tiny_models.FRAMES//per_unit + 2//per_unit                  # the unit of frame 2 of clip 1
    assert torch.equal((seen[0] != seen[1]).any(-1), unit >= first)
    want = torch.nn.functional.linear(torch.cat([torch.ones(1), z[1, 2:2 + per_unit].mean(0)])/2, base.frame_input.lora_input["default"])
    with torch.no_grad(): base.frame_input.lora_input["default"].zero_()
    logits(model, batch, z)
    assert torch.allclose((seen[0] - seen[2])[unit == first], want.expand((unit == first).sum(), -1), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl", "instructblipvideo"])
def test_gradients_are_the_same_with_gradient_checkpointing(family, reentrant):
    model, batch = tiny(family).train(), tiny_models.video_inputs(family)
    one, grads = loss_and_gradients(model, batch, signals())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant: model.enable_input_require_grads()
    two, again = loss_and_gradients(model, batch, signals())
    assert torch.allclose(one, two) and close(grads, again)


@pytest.mark.parametrize("family", READERS)
def test_generation_with_a_cache_and_beams_says_what_it_says_without(family):
    model, batch = tiny(family, scale=2.).eval(), {k: v for k, v in tiny_models.video_inputs(family).items() if k != "labels"}
    def told(z, **how):
        set_frame_signals(model, z)
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True,
                              suppress_tokens=[tiny_models.IMAGE, tiny_models.VIDEO], **how)         # a video token that is written would be one too many
    cached, whole = told(signals()), told(signals(), use_cache=False)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(cached.scores, whole.scores))
    assert not torch.allclose(cached.scores[0], told(signals(seed=1)).scores[0], atol=1e-4)
    if family == "video_llama_3": return                                # transformers 5.23 finds no features for its beams
    told(signals(), num_beams=2)
    one = {k: v for k, v in tiny_models.video_inputs(family, tiny_models.videos(2)[:1]).items() if k != "labels"}
    set_frame_signals(model, signals()[:1])
    alone = model.generate(**one, max_new_tokens=1, do_sample=False, num_beams=2, output_scores=True, return_dict_in_generate=True)
    set_frame_signals(model, signals()[:1])
    with torch.no_grad(): assert torch.allclose(alone.scores[0][0], model(**one).logits[0, -1].log_softmax(-1), atol=1e-4)


def test_low_memory_computes_the_same_gradients():
    batch, found = tiny_models.video_inputs("qwen2_vl"), []
    for levers in (False, True):
        model = tiny("qwen2_vl").train()
        if levers: low_memory(model)
        found.append(loss_and_gradients(model, batch, signals()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5) and close(found[0][1], found[1][1], 1e-4)


@pytest.mark.parametrize("family,quantization", [("smolvlm", "none"), ("smolvlm", "nf4"), ("qwen2_vl", "int8")])
def test_a_saved_adapter_loads_to_the_bit_and_is_never_loaded_without_its_map(family, quantization, tmp_path):
    tiny_models.build(family).save_pretrained(tmp_path/"base")
    def base(): return from_pretrained(tmp_path/"base", quantization, device="cpu").train()
    model, batch = fill(mmqlora.adapt(base(), "lora" if quantization == "none" else "qlora", {m: 2 for m in linears(base())}, gate="input")), tiny_models.video_inputs(family)
    model.save_pretrained(tmp_path/"adapter")
    assert {p.name for p in (tmp_path/"adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    again = load_adapter(base(), tmp_path/"adapter").train()
    assert torch.equal(logits(again, batch, signals()), logits(model, batch, signals()))
    assert not any(p.requires_grad for p in again.parameters()) and load_adapter(base(), tmp_path/"adapter", True).base_model.model.frame_input.lora_input["default"].requires_grad
    unwired = peft.PeftModel.from_pretrained(base(), str(tmp_path/"adapter"))
    with pytest.raises(InputError, match="not wired"): unwired(**batch)
    with pytest.raises(InputError, match="the map of its signals is lost"): wire_gates(unwired)


@pytest.mark.parametrize("call", [merge, lambda m: export(m, "/nonexistent"), lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()])
def test_it_refuses_to_merge_and_leaves_the_base_alone(call):
    model, batch = tiny(), tiny_models.video_inputs("smolvlm")
    before = logits(model, batch, signals())
    with pytest.raises(InputError, match="depend(s)? on the input"): call(model)
    assert torch.equal(logits(model, batch, signals()), before)


def test_an_unloaded_model_is_the_base_again_and_may_be_adapted_anew():
    model, batch, plain = tiny(), tiny_models.video_inputs("smolvlm"), tiny_models.build("smolvlm")
    base = model.unload()
    assert torch.equal(logits(base, batch, signals()), logits(plain, batch, None)) and not adapter_tensors(base)
    again = adapt(base, "lora", {m: 2 for m in linears(base)}, gate="rank")
    assert torch.equal(logits(again, batch, signals()), logits(plain, batch, None))


def test_two_adapters_keep_their_maps_apart():
    model, batch, z = tiny(), tiny_models.video_inputs("smolvlm"), signals()
    model.add_adapter("other", TemporalLoraConfig(**settings(tiny_models.build("smolvlm")), gate="input"))
    wire_gates(model)
    one = logits(model, batch, z)
    model.set_adapter("other")
    assert torch.equal(logits(model, batch, z), logits(tiny_models.build("smolvlm"), batch, z))
    maps = model.get_base_model().frame_input.lora_input
    assert maps["other"].requires_grad and not maps["default"].requires_grad
    model.set_adapter("default")
    assert torch.equal(logits(model, batch, z), one)
    model.delete_adapter("other")
    assert list(maps) == ["default"] and torch.equal(logits(model, batch, z), one)


def test_a_batch_of_mixed_adapters_is_refused():
    model, batch = adapt(tiny_models.build("smolvlm"), "lora", {"text": 2}, gate="input").eval(), tiny_models.video_inputs("smolvlm")
    set_frame_signals(model, signals())
    with pytest.raises(InputError, match="cannot share a batch"): model(**batch, adapter_names=["default", "__base__"])


def test_a_copy_has_a_map_of_its_own():
    model, batch, z = tiny(), tiny_models.video_inputs("smolvlm"), signals()
    before, other = logits(model, batch, z), copy.deepcopy(model)
    other.get_base_model().frame_input.lora_input["default"].data.zero_()
    assert torch.equal(logits(model, batch, z), before) and not torch.equal(logits(other, batch, z), before)


def test_a_family_whose_text_model_no_visual_token_enters_is_refused_before_anything_changes():
    model = tiny_models.build("idefics")
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(InputError, match="no visual token enters its text model"): adapt(model, "lora", gate="input")
    assert [n for n, _ in model.named_parameters()] == names


def test_signals_of_another_batch_or_none_are_an_error():
    model, batch = tiny(), tiny_models.video_inputs("smolvlm")
    with pytest.raises(InputError, match="set_frame_signals"): model(**batch)
    with pytest.raises(InputError, match="set_frame_signals"): logits(model, batch, signals(3))


def trainer(training, config, seed=0):
    clips, captions = training
    model, tokenizer = build(BASE, config, seed, device="cpu")
    return Trainer(model.train(), tokenizer, clips, captions, config, seed)


def test_it_counts_its_map_in_the_audit_in_bytes_and_in_a_group_of_its_own(short):
    model, plain = (build(BASE, short.model_copy(update=dict(gate=g, signals="dense")), device="cpu")[0] for g in ("input", "none"))
    table, without = audit(model).set_index("modality"), audit(plain).set_index("modality")
    assert table.loc["input", ["modules", "adapted", "rank", "params", "adapter_bytes"]].tolist() == [1, 1, 0, 128*10, 4*128*10] and "input" not in without.index
    assert table["adapter_bytes"].sum() == adapter_bytes(model) == adapter_bytes(plain) + 4*1280 and trainable(model) == trainable(plain) + 1280
    groups = make_optimizer(model, short.model_copy(update=TOLD)).param_groups
    assert [(sum(p.numel() for p in g["params"]), g["peak"]) for g in groups[1:]] == [(1280, 3*short.lr)] and groups[1]["weight_decay"] == 0


def test_a_fresh_one_trains_as_qlora_while_its_map_stands_still(training, short):
    still, plain = trainer(training, short.model_copy(update=dict(gate="input", gate_lr=1e-30))), trainer(training, short)
    clips, captions = training
    assert torch.equal(score_captions(still.model.eval(), still.tokenizer, clips, captions, still.signals), score_captions(plain.model.eval(), plain.tokenizer, clips, captions))
    assert still.step(0) == plain.step(0)                               # the loss before the first step; later ones differ by how gradients are clipped


def test_after_training_it_reads_the_signals_and_a_loaded_one_says_the_same(training, short, tmp_path):
    t = trainer(training, short.model_copy(update=TOLD))
    losses = fit(t)["loss"]
    clips, captions = training
    assert losses[-1] < losses[0]
    said = score_captions(t.model, t.tokenizer, clips, captions, t.signals)
    assert not torch.allclose(score_captions(t.model, t.tokenizer, clips, captions, t.signals.flip(1)), said, atol=1e-4)
    t.model.save_pretrained(tmp_path)
    again = load_adapter(load_model(BASE, "nf4", device="cpu")[0], tmp_path)
    assert torch.allclose(score_captions(again, t.tokenizer, clips, captions, t.signals), said, atol=1e-4)        # not lean: other roundings
    assert write_captions(again, t.tokenizer, clips) == write_captions(t.model, t.tokenizer, clips)               # their own signals, standardized by what was saved


def test_the_lean_model_takes_the_same_road(training, short, monkeypatch):
    config = short.model_copy(update=TOLD)
    ours = trainer(training, config)
    monkeypatch.setattr("mmqlora.train.lean", lambda model: model)
    stock = trainer(training, config)
    assert hasattr(ours.model.get_base_model(), "leaned") and not hasattr(stock.model.get_base_model(), "leaned")
    assert [ours.step(n) for n in range(6)] == pytest.approx([stock.step(n) for n in range(6)], rel=1e-3)
    mine, theirs = trained_tensors(ours.model), trained_tensors(stock.model)
    assert list(mine) == list(theirs) and torch.allclose(mine[next(n for n in mine if "lora_input" in n)], theirs[next(n for n in mine if "lora_input" in n)], atol=1e-2)


@pytest.mark.parametrize("ranks", [{"text": 4}, {"vision": 2, "fusion": 2, "text": 2}])
def test_two_equal_runs_are_equal_to_the_bit_with_or_without_a_frozen_tower(training, short, ranks):
    config = short.model_copy(update=TOLD | {"ranks": ranks})
    one, two = trainer(training, config), trainer(training, config)
    assert fit(one)["loss"] == fit(two)["loss"]
    a, b = trained_tensors(one.model), trained_tensors(two.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
