"Training on real 4-bit weights: equal runs are equal, resuming changes nothing, the base stays as it is."
import math
from dataclasses import replace

import peft
import pytest
import torch

from mmqlora.adapters import QUANTIZATION, adapt
from mmqlora.batch import ClipSet
from mmqlora.config import RunConfig
from mmqlora.core import InputError, repo_path
from mmqlora.cost import step_counts
from mmqlora.cpu import dense_bytes, peak_bytes
from mmqlora.ledger import counted, held
from mmqlora.model import linears, load_model
from mmqlora.predict import score_captions, score_galleries, write_answers, write_captions, write_rounds
from mmqlora.quickstart import load
from mmqlora.ranks import audit
from mmqlora.recorded import Recorded
from mmqlora.tasks import asked_of
from mmqlora.temporal import gated_layers
from mmqlora.train import Trainer, build, fit, gate_signals, trained_tensors

BASE = repo_path("models/base")
GATED = dict(gate="rank", gate_lr=3.)


def trained(training, config, **more):
    "(model, trainer, losses) of a run on the shared clips."
    clips, captions = training
    model, tokenizer = build(BASE, config, device="cpu")
    trainer = Trainer(model, tokenizer, clips, captions, config)
    return model, trainer, fit(trainer, **more)["loss"]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("gate", [{}, GATED], ids=["qlora", "gated"])
def test_two_equal_runs_are_equal_to_the_bit(training, short, gate):
    config = short.model_copy(update=gate)
    (one, _, loss), (two, _, again) = trained(training, config), trained(training, config)
    assert loss == again and same(trained_tensors(one), trained_tensors(two))
    assert loss[-1] < loss[0]


@pytest.mark.parametrize("change", [GATED, dict(quantization="int8"), dict(method="qdora"), dict(method="full", lr=1e-3), dict(allocation="prune", budget_rank=2)],
                         ids=["gated", "int8", "qdora", "full", "prune"])
def test_what_is_counted_before_a_run_leaves_no_trace_in_it_and_is_the_same_again(training, short, change):
    config = short.model_copy(update=change)
    alone, _, loss = trained(training, config)
    model, tokenizer = build(BASE, config, device="cpu")
    trainer = Trainer(model, tokenizer, *training, config)
    state, counts = torch.get_rng_state(), step_counts(trainer)
    assert counts == step_counts(trainer) and torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert fit(trainer)["loss"] == loss and same(trained_tensors(model), trained_tensors(alone))


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_bytes_counted_for_a_step_are_those_of_a_later_one_and_near_what_pytorch_allocates(training, short, method):
    model, tokenizer = build(BASE, short.model_copy(update=dict(method=method)), device="cpu")
    trainer = Trainer(model.train(), tokenizer, *training, short)
    counts = step_counts(trainer)
    trainer.step(0)
    trainer.optimizer.zero_grad()
    batch, slots = trainer.batch(0), [v for slot in trainer.optimizer.state.values() for v in slot.values()]
    with counted() as c:
        before = c.hold([*held(model), *slots, *batch.values()]).now
        trainer.gradients(batch)
    assert c.flops == counts["flops"] and c.peak == pytest.approx(counts["peak_bytes"], rel=.02)
    trainer.optimizer.zero_grad()
    beyond = peak_bytes(lambda: trainer.gradients(batch))                # than what is there before: also the copies of `lean`
    assert before + dense_bytes(model) + beyond == pytest.approx(counts["peak_bytes"], rel=.03)


def test_another_seed_is_another_run(training, short):
    clips, captions = training
    model, tokenizer = build(BASE, short, seed=1, device="cpu")
    assert fit(Trainer(model, tokenizer, clips, captions, short, seed=1))["loss"] != trained(training, short)[2]


@pytest.mark.parametrize("gate", [{}, GATED], ids=["qlora", "gated"])
def test_a_run_killed_in_the_middle_and_resumed_equals_an_uninterrupted_one(training, short, gate, tmp_path, monkeypatch):
    config = short.model_copy(update=gate)
    whole, _, loss = trained(training, config)
    step = Trainer.step
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", lambda self, n: (_ for _ in ()).throw(KeyboardInterrupt) if n == 4 else step(self, n))
        with pytest.raises(KeyboardInterrupt): trained(training, config, checkpoint=tmp_path/"c.safetensors", every=3)
    resumed, _, after = trained(training, config, checkpoint=tmp_path/"c.safetensors", every=3)
    assert after == loss and same(trained_tensors(resumed), trained_tensors(whole))


def test_a_checkpoint_of_another_run_is_refused_and_kept(training, short, tmp_path):
    path = tmp_path/"c.safetensors"
    trained(training, short, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="belongs to another configuration"): trained(training, short.model_copy(update={"lr": .1}), checkpoint=path)
    assert path.read_bytes() == before
    path.write_bytes(before[:500])
    with pytest.raises(InputError, match="not a checkpoint"): trained(training, short, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(training, short, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, n: math.nan)
    with pytest.raises(InputError, match="step 0: the loss is nan -- lower lr"): trained(training, short)


def test_qlora_leaves_the_four_bit_base_as_it_was(training, short):
    model, _, _ = trained(training, short.model_copy(update=GATED))
    fresh, _ = load_model(BASE, "nf4", device="cpu")
    packed = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(p, packed[n]) for n, p in fresh.named_parameters())
    assert sum(p.dtype == torch.uint8 for p in packed.values()) == sum(map(len, linears(fresh).values()))


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("gate", ["none", "scalar", "rank"])
def test_only_lora_parameters_are_trainable_and_every_linear_has_its_adapter(method, gate):
    model = adapt(load_model(BASE, QUANTIZATION[method], device="cpu")[0], method, gate=gate)
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    assert (audit(model)["modules"] == audit(model)["adapted"]).all()
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(gated_layers(model)) == (0 if gate == "none" else len(adapted))
    assert gate == "none" or all(m.lora_variant["default"] for m in adapted)


def adapters(training, **more):
    "A gated model and the same adapter without gates, both with random B."
    config = RunConfig(method="qlora", **more)
    torch.manual_seed(1)
    gated, tokenizer = build(BASE, config.model_copy(update=GATED), device="cpu")
    plain, _ = build(BASE, config, device="cpu")
    ours, theirs = dict(gated.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        if "lora_B" in name: parameter.data = torch.randn_like(parameter)*.02
        if "lora_" in name: ours[name].data = parameter.data.clone()
    return gated.eval(), plain.eval(), tokenizer


def test_with_gates_of_one_it_is_lora_to_the_bit(training):
    gated, plain, tokenizer = adapters(training)
    clips, captions = training
    signals = torch.randn_like(clips.signal)
    assert torch.equal(score_captions(gated, tokenizer, clips, captions, signals), score_captions(plain, tokenizer, clips, captions))
    for layer in gated_layers(gated).values(): layer.lora_gate["default"].data[:, 1:] = .5
    assert not torch.equal(score_captions(gated, tokenizer, clips, captions, signals), score_captions(plain, tokenizer, clips, captions))


def test_a_fresh_adapter_changes_nothing(training):
    clips, captions = training
    base, tokenizer = load_model(BASE, "nf4", device="cpu")
    before = score_captions(base, tokenizer, clips, captions)
    assert torch.equal(score_captions(adapt(base, "qlora", gate="rank"), tokenizer, clips, captions, clips.signal), before)


def test_gating_is_the_same_with_gradient_checkpointing(training, short):
    _, _, loss = trained(training, short.model_copy(update=GATED))
    clips, captions = training
    model, tokenizer = build(BASE, short.model_copy(update=GATED), device="cpu")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = fit(Trainer(model, tokenizer, clips, captions, short.model_copy(update=GATED)))["loss"]
    assert again == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("gate", [{}, GATED], ids=["qlora", "gated"])
def test_a_saved_adapter_writes_the_same_captions_when_it_is_loaded_again(training, short, gate, tmp_path):
    clips, _ = training
    model, trainer, _ = trained(training, short.model_copy(update=gate))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again, tokenizer = load(BASE, tmp_path, device="cpu")
    assert isinstance(again, peft.PeftModel)
    assert write_captions(again, tokenizer, clips) == write_captions(model, tokenizer, clips)
    captions = ["first the red disc hops , and then the blue bar expands ."]*len(clips)
    assert torch.equal(score_captions(again, tokenizer, clips, captions), score_captions(model, tokenizer, clips, captions))


def asked(corpus): return [asked_of(r) for r in corpus[1] if r.split == "train"]


def test_a_run_of_captions_is_the_same_whether_more_could_be_asked_or_not(training, short, corpus):
    clips, captions = training
    model, tokenizer = build(BASE, short, device="cpu")
    assert fit(Trainer(model, tokenizer, clips, captions, short, asked=asked(corpus)))["loss"] == trained(training, short)[2]


def test_a_run_of_many_tasks_sees_the_same_clips_and_learns(training, short, corpus):
    clips, captions = training
    config = short.model_copy(update={"tasks": ["caption", "languages", "questions", "instructions", "sound"], "steps": 30})
    losses = []
    for _ in range(2):
        model, tokenizer = build(BASE, config, device="cpu")
        trainer = Trainer(model, tokenizer, clips, captions, config, asked=asked(corpus))
        losses.append(fit(trainer)["loss"])
    assert losses[0] == losses[1] and sum(losses[0][-5:]) < .7*sum(losses[0][:5])
    answers, prompts = trainer.told(0, range(16))
    assert len(set(prompts)) > 4 and "" in prompts and len(answers) == 16
    with pytest.raises(InputError, match="tasks: caption, languages.*nothing to ask of 16 clips"): Trainer(model, tokenizer, clips, captions, config)


def test_prompts_of_different_lengths_in_a_batch_score_as_each_does_alone(training, corpus):
    clips, _ = training
    model, tokenizer = load_model(BASE, "none", device="cpu")
    told = [found["questions"][i % 4][1:] for i, found in enumerate(asked(corpus))]
    prompts, answers = [p for p, _ in told[:6]] + [""]*2, [a for _, a in told[:6]] + ["a red disc grows ."]*2
    together = score_captions(model, tokenizer, clips[:8], answers, prompts=prompts)
    alone = torch.cat([score_captions(model, tokenizer, clips[i:i + 1], answers[i:i + 1], prompts=prompts[i:i + 1]) for i in range(8)])
    assert len({len(p.split()) for p in prompts}) > 2 and torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("gate", [{}, GATED], ids=["qlora", "gated"])
def test_clips_with_fewer_frames_in_a_batch_are_what_they_are_alone(training, short, gate):
    "What an adaptive budget makes: padded frames change neither losses nor gradients, captions nor ranks."
    clips, captions = training[0][:4], training[1][:4]
    few = torch.tensor([8, 3, 5, 1])
    padded = replace(clips, frames=few)
    model, tokenizer = build(BASE, short.model_copy(update={"method": "lora", **gate}), device="cpu")     # 4-bit products round by the shape of a batch
    signals = gate_signals(padded, "motion", padded)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_gate" in name: p.normal_(0, .05, generator=torch.Generator().manual_seed(len(name)))
    def alone(i): return ClipSet(*(getattr(clips, f)[i:i + 1, :few[i]] for f in ("pixels", "position", "signal"))), signals[i:i + 1, :few[i]]
    scores = score_captions(model, tokenizer, padded, captions, signals)
    assert torch.allclose(scores, torch.cat([score_captions(model, tokenizer, c, [captions[i]], s) for i in range(4) for c, s in [alone(i)]]), atol=1e-4)
    written = write_captions(model, tokenizer, padded, signals)
    assert written == [write_captions(model, tokenizer, *alone(i))[0] for i in range(4)]
    galleries = score_galleries(model, tokenizer, padded, captions, ["a"]*4, signals)
    assert torch.allclose(galleries[0].diagonal(), scores, atol=1e-4)
    asked = ["what color is the disc ?", "in german", "summarize", "in german"]
    assert write_rounds(model, tokenizer, padded, [(asked, 8)], signals)[0] == write_answers(model, tokenizer, padded, asked, signals, max_new_tokens=8)


def test_a_run_on_an_adaptive_budget_trains_and_refuses_shuffled_signals(training, short):
    clips, captions = training
    padded = replace(clips, frames=torch.arange(len(clips)) % 8 + 1)
    model, tokenizer = build(BASE, short.model_copy(update=GATED), device="cpu")
    losses = fit(Trainer(model, tokenizer, padded, captions, short.model_copy(update=GATED)))["loss"]
    assert losses[-1] < losses[0]
    model, _ = build(BASE, short.model_copy(update=GATED), device="cpu")
    parts = fit(Trainer(model, tokenizer, padded, captions, short.model_copy(update=GATED), at_once=1))["loss"]
    assert parts == pytest.approx(losses, abs=1e-3)                        # clip by clip it is the same
    with pytest.raises(InputError, match="shuffled needs clips of equally many frames"): gate_signals(padded, "shuffled", padded)


@pytest.mark.parametrize("gate", [{}, GATED], ids=["qlora", "gated"])
def test_rounds_of_prompts_from_one_reading_are_answered_as_each_by_itself(training, short, corpus, gate):
    clips, _ = training
    model, trainer, _ = trained(training, short.model_copy(update={**gate, "steps": 3}))
    found = asked(corpus)
    rounds = [([f["questions"][i % 4][1] for i, f in enumerate(found)], 6), (["in german"]*16, 18), ([f["instructions"][0][1] for f in found], 3)]
    together = write_rounds(model, trainer.tokenizer, clips, rounds, trainer.signals, batch_size=10)
    alone = [write_answers(model, trainer.tokenizer, clips, prompts, trainer.signals, max_new_tokens=n) for prompts, n in rounds]
    assert together == alone and len(set(together[0])) > 3


@pytest.mark.parametrize("change", [{}, dict(method="full", lr=1e-3), dict(method="lora"), dict(method="qdora"), dict(method="bottleneck", quantization="nf4"),
                                    dict(method="prefix", quantization="nf4"), dict(method="ia3", quantization="nf4"), dict(ranks={"vision": 4}), dict(allocation="prune", budget_rank=2)],
                         ids=lambda c: "-".join(map(str, c.values())) or "qlora")
def test_recorded_steps_teach_the_same(training, short, change, monkeypatch):
    "What padding, the forward that asks nothing and the order of zeroing change, which is nothing: on a CPU the work is done again in the place of a graph."
    config, made = short.model_copy(update=change), []
    _, _, loss = trained(training, config)
    monkeypatch.setattr("mmqlora.train.recordable", lambda model: True)
    monkeypatch.setattr("mmqlora.train.Recorded", lambda *args: made.append(Recorded(*args)) or made[-1])
    _, trainer, again = trained(training, config)
    assert again[0] == pytest.approx(loss[0], rel=1e-5) and again == pytest.approx(loss, rel=3e-3) and trainer.recorded is None      # Adam divides small differences by small numbers
    assert len(made) == (config.allocation != "prune") and all(0 < len(m.graphs) <= 2 for m in made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("change", [{}, dict(method="full", lr=1e-3), dict(method="qdora"), dict(method="bottleneck", quantization="nf4"), dict(method="prefix", quantization="nf4")], ids=lambda c: c.get("method", "qlora"))
def test_a_graph_computes_what_the_step_does_batch_after_batch(training, short, change):
    clips, captions = training
    config = short.model_copy(update=change)
    model, tokenizer = build(BASE, config)
    trainer = Trainer(model.train(), tokenizer, clips, captions, config)
    def gradient(n): return trainer.gradients(trainer.batch(n)), torch.cat([p.grad.flatten() for p in trainer.trained]).clone()
    plain = [gradient(n) for n in range(4)]
    with trainer.recording():
        assert trainer.recorded
        for n in (0, 1, 2, 3, 0, 2):
            loss, found = gradient(n)
            trainer.optimizer.zero_grad()                                # frees nothing that a graph writes to
            assert loss == pytest.approx(plain[n][0], rel=1e-2) and torch.nn.functional.cosine_similarity(found, plain[n][1], 0) > .99
