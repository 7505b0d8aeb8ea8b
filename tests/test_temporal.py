"The temporal gate: exact LoRA at gate 1, the same under checkpointing, autocast, caches, beams, unequal clips and several adapters."
import copy

import peft
import pytest
import tiny_models
import torch

from mmqlora.core import InputError
from mmqlora.model import from_pretrained, linears
from mmqlora.ranks import rank_settings
from mmqlora.temporal import GATES, TemporalLoraConfig, gated_layers, set_frame_signals, wire_gates

SOME = ("smolvlm", "idefics", "qwen2_vl", "instructblipvideo")


def signals(batch=2, frames=tiny_models.FRAMES, seed=0): return torch.randn(batch, frames, 2, generator=torch.Generator().manual_seed(seed))


def settings(model): return rank_settings(model, {m: 2 for m in linears(model)})


def fill(model, scale=.3, names=("lora_B", "lora_gate")):
    "Random numbers where training starts from zeros."
    g = torch.Generator().manual_seed(1)
    for n, p in sorted(model.named_parameters()):
        if any(part in n for part in names): p.data = (torch.randn(p.shape, generator=g)*scale).to(p.dtype)
    return model


def adapted(model, gate="rank", names=("lora_B", "lora_gate"), **more):
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings(model)) if gate == "none" else TemporalLoraConfig(**settings(model), gate=gate, **more))
    if gate != "none": wire_gates(model)
    return fill(model, names=names)


def tiny(family, gate="rank", **more): return adapted(tiny_models.build(family), gate, **more)


def loss_and_gradients(model, batch, z=None):
    model.zero_grad()
    if z is not None: set_frame_signals(model, z)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a, b, tol=1e-5): return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=tol, rtol=1e-3) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl", "idefics"])
def test_with_gates_of_one_it_is_lora_to_the_bit(family, quantization, dtype, tmp_path):
    tiny_models.build(family).save_pretrained(tmp_path)
    ours, theirs = (adapted(from_pretrained(tmp_path, quantization, dtype, "cpu").train(), gate, names=("lora_B",)) for gate in ("rank", "none"))
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_models.video_inputs(family).items()}
    (one, grads), (two, plain) = loss_and_gradients(ours, batch, signals()), loss_and_gradients(theirs, batch)
    assert torch.equal(one, two) and all(torch.equal(grads[n], plain[n]) for n in plain if "lora_B" in n)
    if family == "smolvlm": return                                     # transformers 5.17 cannot run it under autocast
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(): assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_gradients_are_the_same_with_gradient_checkpointing(family, reentrant, gate):
    model, batch = tiny(family, gate).train(), tiny_models.video_inputs(family)
    one, grads = loss_and_gradients(model, batch, signals())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant: model.enable_input_require_grads()
    two, again = loss_and_gradients(model, batch, signals())
    lost = {n for n in grads if n not in again}                        # reentrant checkpointing of Idefics' frozen embeddings stops there
    assert not lost or (reentrant and family == "idefics" and all("vision_model" in n for n in lost))
    assert torch.allclose(one, two) and close({n: g for n, g in grads.items() if n not in lost}, {n: again[n] for n in grads if n not in lost})


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl"])
def test_two_forwards_before_one_backward_keep_their_own_signals_under_checkpointing(family):
    model, batch = tiny(family).train(), tiny_models.video_inputs(family)
    each = [loss_and_gradients(model, batch, signals(seed=s))[1] for s in (0, 1)]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    losses = []
    for seed in (0, 1):
        set_frame_signals(model, signals(seed=seed))
        losses.append(model(**batch).loss)
    sum(losses).backward()
    both = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert close({n: each[0][n] + each[1][n] for n in both}, both, 1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_generate_sees_the_gates_that_forward_sees_with_and_without_a_cache(family):
    model, batch = tiny(family).eval(), tiny_models.video_inputs(family)
    del batch["labels"]
    z = signals()
    with torch.no_grad():
        set_frame_signals(model, z.flip(1))
        other = model(**batch).logits[:, -1]
        set_frame_signals(model, z)
        expected = model(**batch).logits[:, -1]
    assert not torch.allclose(expected, other, atol=1e-4)
    runs = []
    for cache in (True, False) if family not in ("idefics", "qwen2_5_omni") else (True,):
        set_frame_signals(model, z)
        runs.append(model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache, output_logits=True, return_dict_in_generate=True))
        assert torch.allclose(runs[-1].logits[0], expected, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(runs[0].logits, runs[-1].logits))


READ = [f for f in tiny_models.FAMILIES if f != "idefics"]              # families whose prompt holds visual tokens


@pytest.mark.parametrize("gate", ["rank", "gradient", "input"])
@pytest.mark.parametrize("family", READ)
def test_embeddings_without_ids_are_refused_by_the_gates_and_nobody_else(family, gate):
    model, batch = tiny(family, gate).train(), tiny_models.video_inputs(family)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    set_frame_signals(model, signals())
    with pytest.raises(InputError, match="no gate could find its visual tokens"): model(**batch)
    with model.disable_adapter(): assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("family", [f for f in READ if f not in ("video_llama_3", "instructblipvideo", "qwen2_5_omni")])      # these cannot
def test_a_prompt_read_in_parts_is_refused(family, size):
    model, batch = tiny(family).eval(), tiny_models.video_inputs(family)
    del batch["labels"]
    read = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=True, prefill_chunk_size=size)
    set_frame_signals(model, signals())
    try:
        with pytest.raises(InputError, match="visual tokens, but input_ids hold"): model.generate(**batch, **read)
    except ValueError as err: assert "Chunked prefill" in str(err)       # older transformers refuse it themselves
    with model.disable_adapter(): assert model.generate(**batch, **read).shape[1] == batch["input_ids"].shape[1] + 2


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "video_llama_3"])
def test_beams_carry_the_signals_of_their_clip(family):
    model = tiny(family).eval()
    clips, z = tiny_models.videos(2), signals()
    search = dict(max_new_tokens=3, min_new_tokens=3, num_beams=3, do_sample=False, use_cache=True)

    def search_on(rows):
        batch = tiny_models.video_inputs(family, [clips[i] for i in rows])
        if "input_features" in batch: batch["input_features"] = torch.zeros_like(batch["input_features"])
        del batch["labels"]
        set_frame_signals(model, z[rows])
        return model.generate(**batch, **search)[:, -3:]
    assert torch.equal(search_on([0, 1]), torch.cat([search_on([0]), search_on([1])]))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "video_llama_3"])
def test_clips_of_unequal_length_in_one_batch_are_what_they_are_alone(family):
    model = tiny(family).eval()
    clips = [tiny_models.videos(1, 6)[0], tiny_models.videos(1, 4, seed=1)[0]]
    z = [signals(1, len(c), seed=i)[0] for i, c in enumerate(clips)]

    def logits(rows):
        set_frame_signals(model, [z[i] for i in rows])
        with torch.no_grad(): return model(**tiny_models.video_inputs(family, [clips[i] for i in rows])).logits[:, -4:]
    assert torch.allclose(logits([0, 1]), torch.cat([logits([0]), logits([1])]), atol=1e-4)


def test_padded_frames_of_a_shorter_clip_take_no_signal():
    model = tiny("smolvlm").eval()
    batch = tiny_models.video_inputs("smolvlm")
    short = tiny_models.video_inputs("smolvlm", [tiny_models.videos(2)[1][:3]])
    for k in ("pixel_values", "pixel_attention_mask"): batch[k] = batch[k].clone(); batch[k][1, 3] = 0
    pad = batch["input_ids"].shape[1] - short["input_ids"].shape[1]
    batch["input_ids"][1] = torch.nn.functional.pad(short["input_ids"][0], (pad, 0))
    batch["attention_mask"][1, :pad] = 0
    z = signals()
    with torch.no_grad():
        set_frame_signals(model, z, frames=[4, 3])
        both = model(**batch).logits[1, -4:]
        set_frame_signals(model, z[1:, :3])
        assert torch.allclose(both, model(**short).logits[0, -4:], atol=1e-4)
        set_frame_signals(model, z)
        with pytest.raises(InputError, match="for 8 frames in all, but the inputs hold 7"): model(**batch)


def test_scalar_gates_have_one_row_and_time_gates_see_the_place_in_the_clip():
    rows = {g: next(iter(gated_layers(tiny("smolvlm", g)).values())).lora_gate["default"].shape for g in ("scalar", "rank", "time")}
    assert rows == {"scalar": (1, 3), "rank": (2, 3), "time": (2, 5)}
    model, still = tiny("smolvlm", "time").eval(), torch.zeros(1, 4, 2)
    clip = tiny_models.videos(1)[0]
    batch = tiny_models.video_inputs("smolvlm", [clip[:1].repeat(4, 1, 1, 1)])
    set_frame_signals(model, still)
    with torch.no_grad(): model(**batch)
    layer = next(iter(gated_layers(model).values()))
    gates = layer.lora_variant["default"].gate(layer, "default", torch.zeros(4, 16, 64))
    assert gates.shape == (4, 1, 2) and len({tuple(g.flatten().tolist()) for g in gates}) == 4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gradient_gate_is_lora_going_forward_and_weighs_what_each_frame_teaches(quantization, tmp_path):
    tiny_models.build("llava_onevision").save_pretrained(tmp_path)
    ours, theirs = (adapted(from_pretrained(tmp_path, quantization, device="cpu").train(), gate, names=("lora_B",)) for gate in ("gradient", "none"))
    batch, z = tiny_models.video_inputs("llava_onevision"), torch.full((2, 4, 2), .5)
    (one, grads), (two, plain) = loss_and_gradients(ours, batch, z), loss_and_gradients(theirs, batch)
    assert torch.equal(one, two) and not any("lora_gate" in n for n, _ in ours.named_parameters())
    g = 2*torch.sigmoid(torch.tensor(.5))
    tower = {n: gradient for n, gradient in plain.items() if "vision_tower" in n}
    assert tower and all(torch.allclose(grads[n], g*p, atol=1e-6, rtol=1e-3) for n, p in tower.items())      # g, not g to the depth
    ours.eval()
    with torch.no_grad():
        set_frame_signals(ours, z)
        assert torch.equal(ours(**batch).logits, theirs.eval()(**batch).logits)


def test_several_adapters_gated_and_plain_live_on_one_base():
    model = tiny("qwen2_vl")
    model.add_adapter("plain", peft.LoraConfig(**settings(tiny_models.build("qwen2_vl"))))
    model.add_adapter("scalar", TemporalLoraConfig(**settings(tiny_models.build("qwen2_vl")), gate="scalar"))
    fill(wire_gates(model) and model)
    batch, out = tiny_models.video_inputs("qwen2_vl"), {}
    del batch["labels"]
    model.eval()
    for name in ("default", "plain", "scalar"):
        model.set_adapter(name)
        for seed in (0, 1):
            set_frame_signals(model, signals(seed=seed))
            with torch.no_grad(): out[name, seed] = model(**batch).logits
    assert torch.equal(out["plain", 0], out["plain", 1])
    assert not any(torch.equal(out[n, 0], out[n, 1]) for n in ("default", "scalar"))
    assert not torch.equal(out["default", 0], out["scalar", 0])
    layer = next(iter(gated_layers(model).values()))
    assert set(layer.lora_gate) == {"default", "scalar"} and type(layer.lora_variant.get("plain")) is type(None)
    model.delete_adapter("scalar")
    assert set(layer.lora_gate) == {"default"}


def many(n, seed=0): return torch.randn(2, tiny_models.FRAMES, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", [*GATES, "input"])
def test_fewer_signals_than_an_adapter_sees_are_refused_and_more_do_nothing(gate):
    model, batch, z = tiny("smolvlm", gate, names=("lora_B", "lora_gate", "lora_input")).train(), tiny_models.video_inputs("smolvlm"), many(3)
    for give in (lambda z: set_frame_signals(model, z), lambda z: batch.update(frame_signals=z)):
        give(z[..., :1])
        with pytest.raises(InputError, match="1 of them, an adapter of this model sees 2"): model(**batch)
        losses = []
        for more in (z[..., :2], z, torch.cat([z[..., :2], 9*z[..., 2:]], -1)):
            give(more)
            (loss := model(**batch).loss).backward()
            losses.append(loss.detach())
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        batch.pop("frame_signals", None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", SOME)
def test_adapters_of_one_two_and_three_signals_each_see_their_own(family, gate):
    "Beside others an adapter computes what it does alone, and heeds each of its signals and no other."
    def added(model, name, n): model.add_adapter(name, TemporalLoraConfig(**settings(tiny_models.build(family)), gate=gate, signals=n))
    alone = {n: tiny(family, gate, signals=n) for n in (1, 2, 3)}
    both, batch, z = tiny(family, gate, signals=2), tiny_models.video_inputs(family), many(3)
    for n in (1, 3): added(both, f"of{n}", n)
    fill(wire_gates(both) and both)
    for n, name in ((1, "of1"), (2, "default"), (3, "of3")):
        theirs = {k.replace(f".{name}.", ".default."): v for k, v in both.state_dict().items() if f".{name}." in k or k.endswith(f"lora_gate.{name}")}
        theirs = {k.replace(f"lora_gate.{name}", "lora_gate.default"): v for k, v in theirs.items()}
        assert not alone[n].load_state_dict(theirs, strict=False).unexpected_keys
        both.set_adapter(name)
        def loss(z, model=both): return loss_and_gradients(model.train(), batch, z)
        (here, grads), (there, own) = loss(z), loss(z[..., :n], alone[n])
        assert torch.equal(here, there)
        assert all(torch.equal(g, own[k.replace(f".{name}.", ".default.").replace(f"lora_gate.{name}", "lora_gate.default")]) for k, g in grads.items())
        for c in range(3):
            other = z.clone()
            other[..., c] += torch.linspace(-1, 1, 4)
            heeded = any(not torch.equal(g, grads[k]) for k, g in loss(other)[1].items())
            assert heeded == (c < n), (n, c)


def test_adapters_mix_within_a_batch():
    base = tiny_models.build("internvl")
    text = rank_settings(base, {"text": 2})
    torch.manual_seed(0)
    model = peft.get_peft_model(base, TemporalLoraConfig(**text))
    model.add_adapter("plain", peft.LoraConfig(**text))
    wire_gates(model)
    fill(model).eval()
    batch = tiny_models.video_inputs("internvl")
    del batch["labels"]
    z, rows = signals(), []
    with torch.no_grad():
        for i, name in enumerate(("default", "plain")):
            model.set_adapter(name)
            set_frame_signals(model, z)
            rows.append(model(**batch).logits[i])
        mixed = model(**batch, adapter_names=["default", "plain"]).logits
        assert torch.allclose(mixed, torch.stack(rows), atol=1e-5)
        assert torch.allclose(model(**batch, adapter_names=["__base__", "plain"]).logits[1], rows[1], atol=1e-5)


def test_a_gated_adapter_on_layers_of_plain_lora_is_refused():
    model = tiny("smolvlm", "none")
    config = TemporalLoraConfig(**settings(tiny_models.build("smolvlm")))
    try: model.add_adapter("gated", config)
    except ValueError: return                                          # peft 0.21 refuses it itself
    with pytest.raises(InputError, match="adapted layers have none"): wire_gates(model)


def test_signals_may_come_with_the_batch_and_a_deep_copy_is_its_own_model():
    model, batch = tiny("qwen2_vl").eval(), tiny_models.video_inputs("qwen2_vl")
    other = copy.deepcopy(model)
    with torch.no_grad():
        a = model(**batch, frame_signals=signals()).logits
        b = other(**batch, frame_signals=signals(seed=1)).logits
        assert torch.equal(other(**batch, frame_signals=signals()).logits, a) and not torch.equal(a, b)
        set_frame_signals(model, signals())
        assert torch.equal(model.base_model(**batch).logits, a)         # as a PeftModel with a task type calls it


@pytest.mark.parametrize("family", ["qwen2_vl", "instructblipvideo"])
def test_an_unloaded_adapter_leaves_nothing_behind_and_another_can_follow(family):
    base, batch = tiny_models.build(family), tiny_models.video_inputs(family)
    del batch["labels"]
    with torch.no_grad(): before = base(**batch).logits
    for _ in range(2):
        model = adapted(base)
        set_frame_signals(model, signals())
        with torch.no_grad(): gated = model(**batch).logits
        base = model.unload()
        hooks = {len(m._forward_pre_hooks) for m in base.modules()}
        assert not torch.equal(gated, before) and hooks == {0, 1}
    with torch.no_grad(): assert torch.equal(base(**batch).logits, before)


def test_signals_of_temporal_patches_may_be_given_per_frame_or_per_patch():
    model, batch, z = tiny("qwen2_5_vl").eval(), tiny_models.video_inputs("qwen2_5_vl"), signals()
    with torch.no_grad():
        frames = model(**batch, frame_signals=z).logits
        patches = model(**batch, frame_signals=z.view(2, 2, 2, 2).mean(2)).logits
    assert torch.allclose(frames, patches, atol=1e-5)


def test_float16_and_bfloat16_adapters_run_beside_their_base():
    for dtype in (torch.bfloat16, torch.float16):
        model = adapted(tiny_models.build("llava_onevision").to(dtype))
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}      # peft keeps adapters in full precision
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_models.video_inputs("llava_onevision").items()}
        for cast in (torch.float32, dtype):
            for p in (p for n, p in model.named_parameters() if "lora_" in n): p.data = p.data.to(cast)
            loss, grads = loss_and_gradients(model, batch, signals())
            assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "smolvlm"])      # transformers 5.17 cannot run it under autocast
def test_under_autocast_a_gate_is_what_it_is_without_but_for_rounding(family, gate):
    "The backward pass runs outside, as in the trainer of transformers."
    model, batch = tiny(family, gate).train(), tiny_models.video_inputs(family)
    plain, grads = loss_and_gradients(model, batch, signals())
    model.zero_grad()
    set_frame_signals(model, signals())
    with torch.autocast("cpu", torch.bfloat16): cast = model(**batch).loss
    cast.backward()
    again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert torch.allclose(plain, cast.float(), rtol=.02) and grads.keys() == again.keys()
    def direction(g): return torch.cat([t.flatten().float() for n, t in sorted(g.items())])
    assert torch.cosine_similarity(direction(grads), direction(again), 0) > .98
    assert all(t.dtype == torch.float32 for t in again.values())


def test_the_constant_control_has_the_mean_of_the_signals_it_replaces():
    from mmqlora.batch import ClipSet
    from mmqlora.train import gate_signals
    noise = torch.Generator().manual_seed(0)
    clips = ClipSet(torch.zeros(64, 4, 3, 8, 8, dtype=torch.uint8), torch.zeros(64, 4), torch.rand(64, 4, 2, generator=noise)**3)
    signals = {kind: gate_signals(clips, kind, clips) for kind in ("motion", "constant", "shuffled", "random")}
    assert signals["constant"].unique().numel() == 1
    for kind in ("motion", "shuffled"): assert torch.allclose(signals[kind].mean((0, 1)), signals["constant"].mean((0, 1)), atol=1e-5)
    assert torch.equal(signals["shuffled"].sort(1)[0], signals["motion"].sort(1)[0]) and not torch.equal(signals["shuffled"], signals["motion"])
    assert torch.allclose(signals["random"].mean((0, 1)), torch.zeros(2), atol=.2)


def test_gates_have_a_learning_rate_of_their_own():
    from mmqlora.config import RunConfig
    from mmqlora.train import make_optimizer
    model = tiny("smolvlm")
    rest, gates = make_optimizer(model, RunConfig(method="qlora", gate="rank", lr=1e-3, gate_lr=5.)).param_groups
    assert gates["lr"] == 5*rest["lr"] and gates["weight_decay"] == 0 and len(gates["params"]) == len(gated_layers(model))
