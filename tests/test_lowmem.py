"The low-memory step: the same losses and gradients as stock for every family and lever, packing, exact resume, too little memory."
import peft
import pytest
import torch
from bitsandbytes import nn as bnb
from tiny_models import FAMILIES, build, video_inputs, videos
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mmqlora.batch import ClipSet, build_tokenizer
from mmqlora.benchmark import build_model, make_batch, quantize_linears, set_up, stir, widen
from mmqlora.blocks import Group, Lin, dense, project
from mmqlora.config import RunConfig
from mmqlora.core import InputError
from mmqlora.ledger import expected_peak, in_host, peak_of, room_for
from mmqlora.lowmem import LEVERS, FeatureCache, linear_loss, low_memory, towers
from mmqlora.model import base_of, linears, mixed_precision, new_model, save_model, small_config
from mmqlora.scenes import vocabulary
from mmqlora.steps import MasterAdamW, MicroBatches, pack, packed
from mmqlora.temporal import GATES, TemporalLoraConfig, set_frame_signals, wire_gates
from mmqlora.train import Trainer, fit, seen_as
from mmqlora.train import build as build_run

BLOCKED = {"smolvlm", "qwen2_vl", "qwen2_5_vl", "video_llama_3", "video_llava", "llava_onevision", "internvl", "qwen2_5_omni"}


def adapted(family, dtype=torch.float32, levers=None, bits=4, **options):
    "A (4-bit) model of the family with LoRA outside its towers; with `levers`, after `low_memory`."
    model = build(family).to(dtype)
    if bits == 4: quantize_linears(model, skip=("lm_head", "embed_out"))
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        if isinstance(getattr(m, "dropout", None), float): m.dropout = 0.
    inner = tuple(n + "." for n in towers(model))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inner) and "lm_head" not in n and "resampler" not in n]
    torch.manual_seed(0)
    model = peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    stir(model, std=.05)
    if levers is not None: low_memory(model, levers, **options)
    return model.train()


def gradients(model, batch, context=None):
    if context:
        with context: loss = model(**batch).loss
    else: loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def distance(a, b):
    "Relative distance of whole gradients."
    assert a.keys() == b.keys()
    return float(sum((a[n] - b[n]).square().sum() for n in a).sqrt()/sum(b[n].square().sum() for n in b).sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_levers_together_leave_loss_and_gradients_as_they_are(family):
    batch = video_inputs(family)
    loss, wanted = gradients(adapted(family), batch)
    model = adapted(family, levers=tuple(LEVERS), embeddings="host", mlp_bytes=2000)
    again, found = gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-6) and distance(found, wanted) < 1e-5
    assert ("2 layers as blocks" in model._mmqlora.done["blocks"]) == (family in BLOCKED)


ALONE = {**{lever: dict(levers=[lever], embeddings="host", head="stream", block=32) for lever in LEVERS},
         "keep_attention": dict(levers=["blocks"], keep_attention=True), "host": dict(levers=["head", "label_loss"], head="host"),
         "stream": dict(levers=["head"], head="stream")}          # offload and graphs need a GPU: cells `blocks+offload`, `blocks+graphs` of the benchmark


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_lever_and_option_alone_leaves_loss_and_gradients_as_they_are(family, name):
    batch = video_inputs(family)
    loss, wanted = gradients(adapted(family), batch)
    again, found = gradients(adapted(family, **ALONE[name]), batch)
    assert again == pytest.approx(loss, rel=1e-6) and distance(found, wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_in_4_bits_is_near_and_says_where_it_does_not_apply(family):
    batch = video_inputs(family)
    loss, wanted = gradients(adapted(family), batch)
    model = adapted(family, levers=["head"], head="nf4")
    again, found = gradients(model, batch)
    if model._mmqlora.done["head"]: assert 0 < abs(again - loss) < .1*loss and 0 < distance(found, wanted) < .5
    else: assert again == loss and distance(found, wanted) == 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3", "qwen3_vl"])
def test_in_16_bits_ours_is_as_close_to_fp32_as_stock(family):
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in video_inputs(family).items()}
    _, wanted = gradients(widen(adapted(family, torch.bfloat16)), {k: v.float() if v.is_floating_point() else v for k, v in batch.items()})
    stock = distance(gradients(adapted(family, torch.bfloat16), batch)[1], wanted)
    ours = distance(gradients(adapted(family, torch.bfloat16, tuple(LEVERS)), batch)[1], wanted)
    assert ours < 2*stock < .1                                                    # rounding the adapters to 16 bits is part of ours


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_ours_is_as_close_to_fp32_as_stock(family):
    "Weights in 32 bits, products in 16: `load_model` on a GPU, or `transformers.Trainer` with bf16=True."
    batch, cast = video_inputs(family), torch.autocast("cpu", torch.bfloat16)
    _, wanted = gradients(adapted(family), batch)
    stock, ours = (distance(gradients(model, batch, cast)[1], wanted) for model in (adapted(family), adapted(family, levers=tuple(LEVERS))))
    assert ours < 2*stock < .2


def test_it_holds_less_than_stock_and_evaluates_as_before():
    peaks = {}
    for way in ("stock", "ours"):
        model = build_model("qwen2.5-vl-7b", "cpu", torch.float32, small=True)
        loss, _ = set_up(model, way)
        long = make_batch(model, 64, "cpu", torch.float32, side=56)
        peaks[way] = peak_of(lambda: loss(long).backward(), model)
    assert peaks["ours"] < .85*peaks["stock"]                                      # on a CPU element-wise pieces are not fused
    batch = video_inputs("qwen2_5_vl")
    stock, ours = adapted("qwen2_5_vl", bits=32), adapted("qwen2_5_vl", levers=tuple(LEVERS), bits=32)
    with torch.no_grad(): torch.testing.assert_close(*(m.eval()(**batch).logits for m in (stock, ours)))


def test_embeddings_tied_to_a_head_in_host_memory_are_looked_up_there():
    model = build_model("qwen2-vl-2b", "cpu", torch.float32, small=True)
    low_memory(model, ["head"], head="stream")
    base = model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight and in_host(base.get_input_embeddings())
    words = base.get_input_embeddings()
    assert torch.equal(words(torch.tensor([[3, 5, 3]])), words.weight[torch.tensor([[3, 5, 3]])])


def test_padding_on_either_side_changes_nothing():
    batch = video_inputs("qwen2_5_vl")
    def padded(left):
        blank = {"input_ids": 0, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
        return {k: F.pad(v, (3, 0) if left else (0, 3), value=blank[k]) if k in blank else v for k, v in batch.items()}
    _, wanted = gradients(adapted("qwen2_5_vl"), batch)
    for left in (True, False):
        assert distance(gradients(adapted("qwen2_5_vl", levers=tuple(LEVERS)), padded(left))[1], wanted) < 1e-5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "video_llama_3", "video_llava", "internvl"])
def test_packing_equals_separate_clips(family):
    clips = videos(2)
    rows = [video_inputs(family, [clips[0]]), video_inputs(family, [clips[1][:2]], text=(20, 21, 22))]
    model = adapted(family, levers=tuple(LEVERS))
    counts = [int((r["labels"] != -100).sum()) for r in rows]
    parts = [gradients(model, r) for r in rows]
    wanted = {n: sum(g[n]*c for (_, g), c in zip(parts, counts))/sum(counts) for n in parts[0][1]}
    batch, lengths = pack(model, rows)
    loss, found = gradients(model, batch, packed(model, lengths))
    assert loss == pytest.approx(sum(p[0]*c for p, c in zip(parts, counts))/sum(counts), rel=1e-5)
    assert distance(found, wanted) < 1e-5
    assert distance(gradients(model, batch)[1], wanted) > 1e-2                     # without isolation the clips do see each other


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_packing_equals_padding(family):
    clips = videos(2)
    rows = [video_inputs(family, [clips[0]]), video_inputs(family, [clips[1][:2]], text=(20, 21, 22))]
    width = max(r["input_ids"].shape[1] for r in rows)
    blank = {"input_ids": 0, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
    def wide(k, v): return F.pad(v, (width - v.shape[1], 0), value=blank[k]) if k in blank else v
    padded = {k: torch.cat([wide(k, r[k]) for r in rows]) for k in rows[0]}
    assert padded["attention_mask"].shape == (2, width) and not padded["attention_mask"].all()
    loss, wanted = gradients(adapted(family), padded)                              # stock: two rows, the shorter one padded
    model = adapted(family, levers=tuple(LEVERS))
    batch, lengths = pack(model, rows)
    again, found = gradients(model, batch, packed(model, lengths))
    assert again == pytest.approx(loss, rel=1e-5) and distance(found, wanted) < 1e-5


def test_loss_at_labels_equals_full_logits_to_the_bit():
    torch.manual_seed(0)
    head, hidden = nn.Linear(32, 128, bias=False).requires_grad_(False), torch.randn(40, 32)
    targets = torch.randint(128, (40,))
    rows = torch.randperm(40)[:9].sort()[0]
    full = F.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.equal(linear_loss(hidden[rows], head, targets[rows]), full[rows])
    assert torch.equal(linear_loss(hidden[rows], head, targets[rows], at_once=4), full[rows])


def test_weights_that_evaluation_packed_for_the_cpu_are_read_right():
    torch.manual_seed(0)
    layer = bnb.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.weight = bnb.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    x, before = torch.randn(3, 64), dense(layer.weight).clone()
    with torch.no_grad(): layer.eval()(x)
    torch.testing.assert_close(dense(layer.weight).float(), before, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(project(x, Group([Lin(layer.weight)]))[0][0], x @ before.T, rtol=5e-2, atol=.2)


def test_a_resumed_run_with_16_bit_adapters_is_exact():
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in video_inputs("qwen2_5_vl").items()}
    def trained(steps, start=None):
        model = adapted("qwen2_5_vl", torch.bfloat16, tuple(LEVERS))
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = MasterAdamW(params.values(), lr=1e-2)
        if start:
            for n, p in params.items(): p.data.copy_(start[0][n])
            optimizer.load_state_dict(start[1])
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad()
        return {n: p.detach().clone() for n, p in params.items()}, optimizer.state_dict()
    whole, _ = trained(4)
    resumed, _ = trained(2, trained(2))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_the_trainer_of_transformers_can_use_it(tmp_path):
    from transformers import Trainer, TrainingArguments
    model = adapted("qwen2_5_vl", levers=tuple(LEVERS))
    batch = video_inputs("qwen2_5_vl", videos(1))
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, remove_unused_columns=False,
                             gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, save_strategy="no", disable_tqdm=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    Trainer(model, args, train_dataset=[batch]*4, data_collator=lambda rows: rows[0]).train()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_B" in n)


def test_cached_features_save_the_tower_and_another_model_does_not_read_them(tmp_path):
    batch = video_inputs("llava_onevision")
    model = adapted("llava_onevision", levers=tuple(LEVERS))
    _, wanted = gradients(model, batch)
    cache, calls = FeatureCache(model, tmp_path), []
    [tower] = towers(model).values()
    tower.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2): assert distance(gradients(model, batch, cache("clip"))[1], wanted) < 1e-6
    assert cache.hits == 1 and len(list(tmp_path.glob("*.safetensors"))) == 1
    other = adapted("llava_onevision")
    next(iter(towers(other).values())).get_parameter("embeddings.position_embedding.weight").data += 1
    with (another := FeatureCache(other, tmp_path))("clip"): other(**batch)
    assert another.hits == 0


def test_out_of_memory_in_the_middle_halves_the_micro_batch_and_keeps_the_gradient():
    model = adapted("smolvlm", levers=tuple(LEVERS))
    batch = video_inputs("smolvlm", videos(4))
    _, wanted = gradients(model, batch)
    params, memory = [p for p in model.parameters() if p.requires_grad], 2

    def loss_sum(part):
        if len(part["labels"]) > memory: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model(**part).loss*(part["labels"][:, 1:] != -100).sum()

    micro = MicroBatches(4)
    micro(loss_sum, params, batch)
    assert micro.size == 2 and micro.log == [2]
    assert distance({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted) < 1e-5
    memory = 0
    with pytest.raises(InputError, match="one example does not fit"): micro(loss_sum, params, batch)


def test_an_adapter_that_is_not_plain_lora_keeps_its_layer_stock():
    model = build("qwen2_5_vl").requires_grad_(False)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" in n]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, use_dora=True)).train()
    report = low_memory(model)
    assert "2 checkpointed" in report.done["blocks"] and "LoRA variant" in report.done["blocks"]
    assert model(**video_inputs("qwen2_5_vl")).loss.isfinite()


def gated(family, gate, levers=None, **options):
    "A 4-bit model with temporal gates on the linears of its text model; with `levers`, after `low_memory`."
    model = build(family)
    quantize_linears(model, skip=("lm_head", "embed_out"))
    torch.manual_seed(0)
    text = {n: 4 if i % 2 else 2 for i, n in enumerate(linears(model)["text"])}                # ranks that differ
    model = peft.get_peft_model(model.requires_grad_(False), TemporalLoraConfig(r=4, lora_alpha=8, target_modules=list(text), rank_pattern=text, gate=gate))
    wire_gates(model)
    stir(model, ("lora_B", "lora_gate"), std=.3)
    if levers is not None: low_memory(model, levers, **options)
    return model.train()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["smolvlm", "qwen2_vl", "video_llama_3", "video_llava"])
def test_gated_layers_run_as_blocks_with_the_same_gradients(family, gate):
    batch, z = video_inputs(family), torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for levers in (None, tuple(LEVERS)):
        model = gated(family, gate, levers, mlp_bytes=2000)
        set_frame_signals(model, z)
        results.append(gradients(model, batch))
    assert "2 layers as blocks" in model._mmqlora.done["blocks"]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6) and distance(results[1][1], results[0][1]) < 1e-5
    for key in ("lora_gate", "lora_A"):
        parts = [{n: g for n, g in found.items() if key in n} for _, found in results]
        assert not parts[0] or distance(*parts) < 1e-5


@pytest.mark.parametrize("gate", ["none", "scalar", "rank", "gradient"])
def test_recorded_halves_read_the_gates_of_their_own_batch(gate):
    batch = video_inputs("qwen2_vl")
    def run(**options):
        model = gated("qwen2_vl", gate, tuple(LEVERS), **options) if gate != "none" else adapted("qwen2_vl", levers=tuple(LEVERS), **options)
        def loss(seed):
            if gate != "none": set_frame_signals(model, torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(seed)))
            return model(**batch).loss
        found = {}
        def note(key):
            found[key] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        for seed in (0, 1): loss(seed).backward(); note(seed)
        for seed in (0, 1): loss(seed).backward()                                  # accumulated
        note("both")
        (loss(0) + loss(1)).backward(); note("at once")                            # two forward passes before a backward pass
        return found
    wanted, found = run(), run(graphs=True)
    for key in wanted: assert distance(found[key], wanted[key]) < 1e-5
    assert distance(found["both"], found["at once"]) < 1e-5
    assert gate == "none" or distance(found[0], found[1]) > 1e-3


def test_gates_are_found_while_the_tower_runs():
    model, found = gated("qwen2_vl", "rank", tuple(LEVERS)), []
    plan = model._mmqlora.plan
    first = next(m for m in model.modules() if type(m).__name__ == "Qwen2VLDecoderLayer")
    first.register_forward_pre_hook(lambda *_: found.append(plan.gates is not None and plan.gates.layout is plan.state.layout))
    for seed in (0, 1, 2):
        set_frame_signals(model, torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(seed)))
        model(**video_inputs("qwen2_vl")).loss.backward()
    assert found == [True]*3


def test_an_embedding_of_a_class_of_its_own_goes_to_host_memory_too():
    report = low_memory(adapted("idefics"), embeddings="host")
    assert report.done["embeddings"].endswith("of embeddings in host memory")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    "A tiny base on disk, clips and captions: what a `Trainer` needs, with changes to the configuration."
    folder, tokenizer, noise = tmp_path_factory.mktemp("base"), build_tokenizer(vocabulary()), torch.Generator().manual_seed(0)
    size = dict(hidden=64, layers=1, mlp=128)
    save_model(folder, new_model(small_config(tokenizer, size, size)), tokenizer, {})
    clips = ClipSet(torch.randint(0, 256, (16, 3, 3, 32, 32), dtype=torch.uint8, generator=noise), torch.tensor([[.1, .4, .8]]*16), torch.rand(16, 3, 2, generator=noise))
    captions = ["first the red disc hops , and then the blue bar expands .", "the red disc hops ."]*8

    def trainer(change=lambda model: None, **more):
        config = RunConfig(**{**dict(method="qlora", ranks={"text": 4}, steps=4, batch_size=8, warmup=1, lr=1e-2), **more})
        model, _ = build_run(folder, config, device="cpu")
        change(model)
        return Trainer(model, tokenizer, clips, captions, config)
    return trainer


def test_a_step_is_imagined_with_its_batch_in_one_place(small_run):
    class Far(torch.Tensor):                                                       # stands for a tensor on a GPU
        def cpu(self):
            assert not _get_current_dispatch_mode_stack()                          # inside a ledger that imagines, nothing would move
            return self.as_subclass(torch.Tensor)
    trainer = small_run(gate="rank", signals="energy")
    batch, seen = trainer.batch(0), []
    def loss(given):
        seen.extend(type(v) for v in given.values())
        return trainer.loss(given)
    far = {k: v.as_subclass(Far) for k, v in batch.items()}
    assert expected_peak(loss, trainer.model.train(), far) == expected_peak(trainer.loss, trainer.model, batch)
    assert set(seen) == {torch.Tensor}


@pytest.mark.parametrize("gate", ["none", "rank"])
def test_a_step_of_an_int8_model_is_imagined_before_its_first_step_and_after(small_run, gate):
    trainer = small_run(quantization="int8", gate=gate)
    batch, layers = trainer.batch(0), [m for m in trainer.model.get_base_model().model.text_model.modules() if isinstance(m, bnb.Linear8bitLt)]
    first = expected_peak(trainer.loss, trainer.model.train(), batch)
    assert layers and not any(m.weight.is_meta or m.weight.CB is None for m in layers)
    loss = trainer.loss(batch).detach()                                            # moves the weights into the layers' states
    assert all(m.weight.CB is None and not m.state.CB.is_meta and m.state.threshold for m in layers)
    assert expected_peak(trainer.loss, trainer.model, batch) == first and torch.equal(trainer.loss(batch), loss)
    assert all(not m.state.CB.is_meta and m.state.threshold for m in layers)


@pytest.mark.parametrize("gate", ["none", "rank"])
def test_our_trainer_trains_a_model_after_low_memory_as_before(small_run, gate):
    plain, ours = fit(small_run(gate=gate)), fit(small_run(low_memory, gate=gate))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize("gate", ["none", "rank", "gradient"])
def test_our_trainer_trains_a_model_after_low_memory_under_autocast(small_run, gate):
    def change(model): mixed_precision(base_of(model), "cpu"); low_memory(model)
    plain, ours = fit(small_run(gate=gate)), fit(small_run(change, gate=gate))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=2e-2)


def test_full_fine_tuning_after_low_memory_is_the_same(small_run):
    plain, ours = (fit(small_run(change, method="full", lr=1e-3)) for change in (lambda model: None, low_memory))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_adapters_of_16_bits_are_trained_with_masters(small_run):
    def half(model):
        for n, p in model.named_parameters():
            if "lora_" in n: p.data = p.data.bfloat16()
    trainer = small_run(half)
    assert isinstance(trainer.optimizer, MasterAdamW)
    assert isinstance(small_run().optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("change", [lambda model: None, low_memory])
def test_a_step_that_would_not_fit_is_refused_before_it_starts_with_the_nearest_that_does(small_run, change):
    trainer = small_run(change, gate="rank")
    trainer.model.train()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    batch = trainer.batch(0)
    whole, half = (expected_peak(trainer.loss, trainer.model, {k: v[:n] for k, v in batch.items()}) for n in (8, 4))
    with pytest.raises(InputError, match=r"8 clips at once .* at_once=4"): fit(trainer, memory=(whole + half)//2)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert len(fit(trainer, memory=whole)["loss"]) == 4


def test_where_not_even_one_clip_fits_the_error_names_how_many_frames_of_it_do(small_run):
    trainer = small_run()
    trainer.model.train()
    two, three = (trainer.need(1, frames) for frames in (2, 3))
    with pytest.raises(InputError, match="at_once=1 and clips of 2 frames"): fit(trainer, memory=(two + three)//2)
    with pytest.raises(InputError, match="one frame of one clip needs"): fit(trainer, memory=trainer.need(1, 1) - 1)


def test_fit_asks_by_itself_what_the_gpu_of_the_model_has(small_run, monkeypatch):
    trainer = small_run()
    monkeypatch.setattr("mmqlora.train.room_for", lambda model, optimizer: trainer.need(8, 3) - 1)
    with pytest.raises(InputError, match="the nearest that fits: at_once=4"): fit(trainer)
    assert len(fit(trainer, memory=float("inf"), stop=1)["loss"]) == 1
    assert room_for(trainer.model, trainer.optimizer) is None                                        # on a CPU


@pytest.mark.parametrize("change", [lambda model: None, low_memory])
def test_out_of_memory_in_a_step_of_the_trainer_halves_it_and_changes_no_weight(small_run, change, monkeypatch):
    whole, scarce = small_run(change, gate="rank"), small_run(change, gate="rank")
    whole.model.train(), scarce.model.train()
    forward, calls = type(scarce).loss, []
    def loss(self, batch, reduction="mean"):
        calls.append(len(batch["labels"]))
        if calls[-1] > 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch, reduction)
    wanted = [whole.step(n) for n in range(3)]
    monkeypatch.setattr(type(scarce), "loss", loss)
    assert [scarce.step(n) for n in range(3)] == pytest.approx(wanted, rel=1e-4)
    assert calls == [8, 4] + [2]*12 and scarce.micro.log == [2]                                     # what was found in the first step is kept
    got, expected = dict(scarce.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.allclose(got[n], p, atol=1e-3) for n, p in expected.items() if p.requires_grad)


def test_a_run_after_low_memory_resumes_exactly_from_the_checkpoint_of_the_trainer(small_run, tmp_path):
    def half(model):
        for n, p in model.named_parameters():
            if "lora_" in n: p.data = p.data.bfloat16()
        low_memory(model)
    whole, begun, resumed = small_run(half), small_run(half), small_run(half)
    loss = fit(whole)["loss"]
    fit(begun, tmp_path/"run.safetensors", stop=2)
    assert fit(resumed, tmp_path/"run.safetensors")["loss"] == loss and isinstance(resumed.optimizer, MasterAdamW)
    assert all(torch.equal(p, q) for p, q in zip(whole.trained, resumed.trained))


def test_the_trainer_reads_features_from_a_cache_and_changed_pixels_or_frames_are_others(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmqlora.train.lean", lambda model: model)                  # it remembers frames itself, on a CPU only
    plain, cached = small_run(), small_run()
    def again(t, **more): return Trainer(t.model, t.tokenizer, t.clips, ["the red disc hops ."]*16, t.config, **more)
    plain, cached = again(plain, at_once=1), again(cached, features=FeatureCache(cached.model, tmp_path))
    assert fit(cached)["loss"] == pytest.approx(fit(plain)["loss"], rel=1e-4)
    assert cached.features.hits == 4*8 - 16 == len(list(tmp_path.glob("*.safetensors")))       # two epochs of sixteen clips
    pixels = cached.batch(0)["pixel_values"][:1]
    assert len({seen_as(v) for v in (pixels, pixels[:, :2], pixels.flip(1), pixels + 1)}) == 4
