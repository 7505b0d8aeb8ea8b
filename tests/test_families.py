"Eleven families of models, full and quantized: adapters go where they were asked to go and nowhere else, and training touches nothing else."
import peft
import pytest
import tiny_models
import torch
from torch import nn

import mmqlora
from mmqlora.adapters import adapt, load_adapter, save_adapter
from mmqlora.allocate import allocate, budget_of
from mmqlora.bottleneck import add_bottlenecks
from mmqlora.core import InputError
from mmqlora.families import FAMILIES, Family, declare_family, family_of, in_rows, space_of
from mmqlora.model import MODALITIES, NO_TOWER, from_pretrained, linears
from mmqlora.prune import Pruner
from mmqlora.ranks import adapter_bytes, audit
from mmqlora.temporal import gated_layers, set_frame_signals


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "family -> folder of its tiny model, saved once."
    made = {}

    def save(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_models.build(family).save_pretrained(made[family])
        return made[family]
    return save


def signals(batch=2, frames=tiny_models.FRAMES, seed=0): return torch.randn(batch, frames, 2, generator=torch.Generator().manual_seed(seed))


def adapted(model, gate="rank", ranks=None):
    "The model with adapters everywhere (or as `ranks` says), whatever the bits of its base."
    from mmqlora.ranks import rank_settings
    from mmqlora.temporal import TemporalLoraConfig, wire_gates
    settings = rank_settings(model, ranks or {m: 2 for m in linears(model)})
    config = peft.LoraConfig(**settings) if gate == "none" else TemporalLoraConfig(**settings, gate=gate)
    torch.manual_seed(0)
    model = peft.get_peft_model(model.requires_grad_(False), config)
    if gate != "none": wire_gates(model)
    return model


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_one_step_of_a_gated_adapter_changes_only_lora_parameters(folder, family, quantization):
    base = from_pretrained(folder(family), quantization, device="cpu").train()      # in eval mode bitsandbytes repacks 4-bit weights on some CPUs
    batch, towers = tiny_models.video_inputs(family), linears(base)
    kind = {"none": nn.Linear, "nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    assert all(type(m) is kind or type(m).__name__ == kind for modules in towers.values() for m in modules.values())
    with torch.no_grad(): before = base(**batch).logits
    model = adapted(base)
    set_frame_signals(model, signals())
    table = audit(model, {m: 2 for m in towers})
    assert table.set_index("modality")["modules"].to_dict() == {m: len(modules) for m, modules in towers.items()}
    with torch.no_grad(): assert torch.equal(model(**batch).logits, before)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=1.)
    for _ in range(2):                                               # gates learn from the second step on: B is 0 in the first
        optimizer.zero_grad()
        model(**batch).loss.backward()
        unreached = [n for n, p in named.items() if p.grad is None]
        assert all(family == "video_llava" and "video_tower.encoder.layers.1." in n for n in unreached)    # it reads the last layer but one
        optimizer.step()
    assert all("lora_" in n for n in named) and all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    moved = {part: any(not torch.equal(p, start[n]) for n, p in named.items() if part in n) for part in ("lora_A", "lora_B", "lora_gate")}
    assert all(moved.values()), moved
    with torch.no_grad():
        with model.disable_adapter(): assert torch.equal(model(**batch).logits, before)
        lively = model(**batch).logits
        set_frame_signals(model, signals(seed=1))
        assert not torch.equal(model(**batch).logits, lively)


def unread(family, name):
    "Whether a parameter lies in a layer whose output nobody reads: Video-LLaVA takes its tower's last layer but one."
    return family == "video_llava" and "video_tower.encoder.layers.1." in name


@pytest.mark.parametrize("method, quantization", [("dora", "none"), ("qdora", "int8"), ("ia3", "nf4"), ("bottleneck", "none"), ("bottleneck", "nf4"), ("prefix", "none"), ("prefix", "int8")])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_method_trains_is_kept_and_writes_in_every_family(folder, family, method, quantization, tmp_path):
    def base(): return from_pretrained(folder(family), quantization, device="cpu").train()
    model, batch = base(), tiny_models.video_inputs(family)
    with torch.no_grad(): before = model(**batch).logits
    towers = list(linears(model))
    model = adapt(model, method, {m: 2 for m in towers}, width=3, prefix_length=3)
    with torch.no_grad(): assert torch.equal(model(**batch).logits, before)
    adapted_in = audit(model).set_index("modality")["adapted"]
    assert all(adapted_in[m] > 0 or (method, m) == ("prefix", "fusion") and family not in ("idefics", "instructblipvideo") for m in towers)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=1.)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(p.grad is not None or unread(family, n) for n, p in named.items())
        optimizer.step()
    with torch.no_grad(): after = model(**batch).logits
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    save_adapter(model, tmp_path)
    again = load_adapter(base(), tmp_path, trainable=True)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, after)
        written = again.eval().generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert len(written) == 2 and written.shape[1] >= 2


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_prefix_sits_in_every_tower_and_refuses_a_connector_without_attention(family):
    def sits(where): return audit(adapt(tiny_models.build(family), "prefix", {where: 1})).set_index("modality")["adapted"]
    for modality in linears(tiny_models.build(family)):
        if modality == "fusion" and family not in ("idefics", "instructblipvideo"):
            with pytest.raises(InputError, match="no attention with q_proj found in fusion"): sits(modality)
        else: assert sits(modality)[modality] > 0 and not sits(modality).drop(modality).any()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_of_the_vision_tower_look_along_the_time_of_their_own_clip(family):
    model = add_bottlenecks(tiny_models.build(family), ["vision"], 3)
    blocks = {n: p for n, p in model.named_parameters() if "adapter_" in n}
    for name, p in blocks.items():
        if name.endswith(("adapter_up", "adapter_time")): p.data.normal_(0, .5, generator=torch.Generator().manual_seed(0))
    packs = FAMILIES[model.config.model_type].packs
    clips = [*tiny_models.videos(1), *tiny_models.videos(1, frames=8 if packs else 4, size=84 if packs else 56, seed=1)]
    def last(*clips):
        with torch.no_grad(): return model(**tiny_models.video_inputs(family, list(clips), sound=False)).logits[:, -1]
    both = last(*clips)
    for row, clip in zip(both, clips): torch.testing.assert_close(row[None], last(clip), rtol=1e-4, atol=1e-4)
    for name, p in blocks.items():
        if name.endswith("adapter_time"): p.data[..., [0, 2]] = 0                          # each frame for itself
    assert not torch.allclose(last(*clips), both, atol=1e-6)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_pruning_meets_its_budget_and_keeps_what_it_computes(family):
    model, batch = tiny_models.build(family), tiny_models.video_inputs(family)
    model = adapt(model, "lora", {m: 4 for m in linears(model)})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    budget = adapter_bytes(model)//2
    pruner = Pruner(model, optimizer, budget, steps=6, every=1)
    for step in range(6):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        pruner(step)
    with torch.no_grad(): before = model(**batch).logits
    pruner.finish()
    assert .98 < adapter_bytes(model)/budget <= 1                          # a direction is 1 % of the bytes of a model this small
    ranks = {n: m.r["default"] for n, m in pruner.layers.items()}
    assert len(set(ranks.values())) > 1 and all(r == 1 for n, r in ranks.items() if unread(family, n + "."))
    with torch.no_grad(): torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_a_tower_that_only_some_batches_reach_is_pruned_by_those():
    model, heard, quiet = tiny_models.build("qwen2_5_omni"), tiny_models.video_inputs("qwen2_5_omni"), tiny_models.video_inputs("qwen2_5_omni", sound=False)
    model = adapt(model, "lora", {"text": 4, "audio": 4})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruner = Pruner(model, optimizer, adapter_bytes(model)//2, steps=8, every=1)
    for step in range(8):
        optimizer.zero_grad()
        model(**(heard if step == 6 else quiet)).loss.backward()
        optimizer.step()
        pruner(step)                                                        # from step 4 on the masks are what they are
    with torch.no_grad(): before = model(**heard).logits
    pruner.finish()
    assert {m.r["default"] for n, m in pruner.layers.items() if "audio_tower" in n} == {1}
    with torch.no_grad(): torch.testing.assert_close(model(**heard).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["entropy", "eva", "gradient", "joint"])
def test_calibration_without_sound_gives_no_rank_to_an_audio_tower_and_says_so(rule):
    from mmqlora.joint import options_for
    model, batches = tiny_models.build("qwen2_5_omni"), [tiny_models.video_inputs("qwen2_5_omni", sound=False)]
    ranks = {m: 4 for m in linears(model)}
    with pytest.raises(InputError, match=r"calibration: no batch reaches model\.audio_tower\.layers\.0\.self_attn\.k_proj \(13 linears in all\)"):
        options_for(model, batches, ranks) if rule == "joint" else allocate(model, rule, ranks, budget_of(model, ranks), batches)
    if rule == "joint": return
    for seen in (ranks | {"audio": 0}, {n: 4 for m, ms in linears(model).items() if m != "audio" for n in ms}):
        found = allocate(model, rule, seen, budget_of(model, seen), batches)
        assert not any("audio_tower" in n for n in found) and len(set(found.values())) > 1


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_no_adapter_leaks_into_a_tower_that_was_not_asked_for(family):
    model = tiny_models.build(family)
    for modality in linears(model):
        model = adapted(model, "none", {modality: 2})
        rows = audit(model, {modality: 2}).set_index("modality")["adapted"]
        assert rows[modality] > 0 and rows.drop(modality).sum() == 0
        model = model.unload()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_linear_has_one_modality_or_is_a_declared_exception(family):
    model = tiny_models.build(family)
    mapped = [n for modules in linears(model).values() for n in modules]
    rest = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(mapped)
    skipped = NO_TOWER.get(model.config.model_type, ())
    assert len(mapped) == len(set(mapped))
    assert all(n.endswith("lm_head") or n.startswith(skipped) for n in rest), rest


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_signals_reach_the_logits_only_through_their_own_frame(family):
    "Two clips of a batch: what happens in one says nothing about the other."
    model, batch = adapted(tiny_models.build(family)), tiny_models.video_inputs(family)
    for layer in gated_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(0, .5, generator=torch.Generator().manual_seed(0))
        layer.lora_gate["default"].data[:, 1:] = 1.
    z = signals()
    def logits(signal):
        set_frame_signals(model, signal)
        with torch.no_grad(): return model.eval()(**batch).logits
    same, other = logits(z), logits(torch.stack([z[0], z[1].flip(0)]))
    assert torch.allclose(same[0], other[0], atol=1e-5) and not torch.allclose(same[1], other[1], atol=1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_map_counts_the_visual_tokens_that_the_model_takes(family):
    model, batch = tiny_models.build(family), tiny_models.video_inputs(family)
    rule = family_of(model)
    from mmqlora.families import tower_inputs
    tower = tower_inputs(batch) | ({"kept": batch["video_compression_mask"]} if "video_compression_mask" in batch else {})
    visual = rule.visual(model.config, tower, [4, 4])
    if rule.token_id: assert int((batch["input_ids"] == getattr(model.config, rule.token_id)).sum()) == len(visual.token)
    assert visual.token.max() + 1 == sum(visual.units) and (visual.token[visual.token >= 0].diff() >= 0).all()


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "idefics"])
def test_wrong_signals_are_an_error_that_names_them(family):
    model, batch = adapted(tiny_models.build(family)), tiny_models.video_inputs(family)
    for wrong in (signals(frames=7), signals(batch=3)):
        set_frame_signals(model, wrong)
        with pytest.raises(InputError, match="frame signals"): model(**batch)
    model = adapted(tiny_models.build(family))
    with pytest.raises(InputError, match="call set_frame_signals"): model(**batch)


def test_audit_refuses_an_adapter_that_no_row_would_show_and_one_on_nothing():
    for targets in (["lm_head"], ["lm_head", "q_proj"]):
        model = peft.get_peft_model(tiny_models.build("internvl"), peft.LoraConfig(target_modules=targets))
        with pytest.raises(InputError, match="'lm_head' has an adapter and belongs to no tower"): audit(model)
    model = peft.get_peft_model(tiny_models.build("video_llava"), peft.LoraConfig(target_modules=r".*image_tower.*\.q_proj"))
    with pytest.raises(InputError, match="has an adapter and belongs to no tower"): audit(model)
    model = adapted(tiny_models.build("internvl"), "none")
    model.delete_adapter("default")
    with pytest.raises(InputError, match="not one linear has an adapter"): audit(model)


def test_audit_refuses_a_base_that_adapt_refuses(folder):
    model = adapted(tiny_models.build("smolvlm"), "none", {"text": 2})
    base = model.get_base_model().model
    for one, two in ((base.vision_model.encoder.layers[0].mlp, base.vision_model.encoder.layers[1].mlp), (base.text_model.layers[0].mlp, base.text_model.layers[1].mlp)):
        kept = getattr(two, fc := "fc1" if hasattr(two, "fc1") else "up_proj")
        own, shared = getattr(kept, "base_layer", kept), getattr(one, fc)
        weight, own.weight = own.weight, getattr(shared, "base_layer", shared).weight
        with pytest.raises(InputError, match="share one weight"): audit(model)
        own.weight = weight
    audit(model)
    model.config.model_type = "stranger"
    with pytest.raises(InputError, match=r"declare MODALITIES\['stranger'\]"): audit(model)


def test_audit_and_linears_see_a_conv1d():
    from transformers.pytorch_utils import Conv1D
    model = adapted(tiny_models.build("smolvlm"), "none", {"text": 2})
    model.get_base_model().model.text_model.layers[0].mlp.extra = Conv1D(8, 64)
    with pytest.raises(InputError, match="is a Conv1D, which no adapter here reaches"): audit(model)
    with pytest.raises(InputError, match="is a Conv1D, which no adapter here reaches"): linears(model.unload())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_audit_refuses_a_modality_that_is_quantized_in_part_unless_it_was_planned(folder, quantization):
    base = from_pretrained(folder("smolvlm"), quantization, device="cpu")
    base.model.text_model.layers[1].mlp.up_proj = nn.Linear(64, 64, bias=False)
    model = adapted(base, "none")
    with pytest.raises(InputError, match="audit: text: linears of .*/32 bits, e.g. model.text_model.layers.1.mlp.up_proj of 32"): audit(model)
    base.planned_bits = {}
    assert audit(model).set_index("modality")["bits"]["text"].endswith("/32")


def test_unknown_family_raises_with_what_to_declare():
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(model_type="opt", hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16, vocab_size=32)
    model = Blip2ForConditionalGeneration(Blip2Config(vision_config=small, qformer_config=small | {"vocab_size": 32}, text_config=text))
    with pytest.raises(InputError, match=r"declare MODALITIES\['blip-2'\]"): mmqlora.adapt(model, "lora")
    try:
        declare_family("blip-2", dict(vision="vision_model.", fusion=("qformer.", "language_projection"), text="language_model."))
        with pytest.raises(InputError, match="no map from frames to tokens"): mmqlora.adapt(model, "lora", gate="rank")
        assert (audit(mmqlora.adapt(model.eval(), "lora"))["adapted"] > 0).all()
    finally:
        for table in (MODALITIES, NO_TOWER): table.pop("blip-2")


def test_a_declared_family_can_be_gated():
    own = MODALITIES["smolvlm"], NO_TOWER.get("smolvlm", ()), FAMILIES["smolvlm"]
    try:
        declare_family("smolvlm", dict(own[0]), Family(lambda config, tower, frames: in_rows(frames, 4)))
        model = adapted(tiny_models.build("smolvlm"))
        set_frame_signals(model, signals())
        assert torch.isfinite(model(**tiny_models.video_inputs("smolvlm")).loss)
    finally: declare_family("smolvlm", own[0], own[2], own[1])


def test_the_audit_fails_on_an_empty_tower_and_on_a_stray_linear():
    model = tiny_models.build("internvl")
    model.model.multi_modal_projector = nn.Identity()
    with pytest.raises(InputError, match=r"no linears found for \['fusion'\]"): linears(model)
    model = tiny_models.build("internvl")
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="'model.extra' belongs to no tower"): linears(model)


def test_layers_that_see_no_frame_stay_plain_lora():
    for family, none in {"idefics": "model.layers.", "qwen2_5_omni": "model.audio_tower."}.items():
        model = adapted(tiny_models.build(family))
        assert not any(n.startswith(f"base_model.model.{none}") for n in gated_layers(model))
        assert all(space_of(model.get_base_model(), n.removeprefix("base_model.model.")) for n in gated_layers(model))


def test_linears_that_share_a_weight_or_ignore_an_adapter_are_refused_by_name():
    model = tiny_models.build("internvl")
    one, two = list(linears(model)["text"].items())[:2]
    same = next((n, m) for n, m in linears(model)["text"].items() if n != one[0] and m.weight.shape == one[1].weight.shape)
    same[1].weight = one[1].weight
    with pytest.raises(InputError, match=f"'{one[0]}' and '{same[0]}' share one weight.*NO_TOWER"): linears(model)
    model = tiny_models.build("internvl")
    model.model.language_model.layers[0].self_attn.extra = nn.MultiheadAttention(16, 2)
    with pytest.raises(InputError, match="lies in nn.MultiheadAttention, which would ignore an adapter"): linears(model)


def test_the_output_head_and_what_it_is_tied_to_get_no_adapter_in_any_family():
    for family in tiny_models.FAMILIES:
        model = adapted(tiny_models.build(family), "none")
        head = model.get_base_model().get_output_embeddings()
        assert head is None or not hasattr(head, "lora_A"), family
