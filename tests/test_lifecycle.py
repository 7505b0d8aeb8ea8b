"A trained adapter: saved, loaded, resumed, merged, exported, trained by other people's trainers; and refused where it would be misread."
import json
import os
import subprocess
import sys

import peft
import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_temporal import adapted, fill, loss_and_gradients, settings, signals

import mmqlora
from mmqlora.adapters import load_adapter
from mmqlora.core import InputError
from mmqlora.lifecycle import export, float_weight, merge
from mmqlora.model import from_pretrained, linears
from mmqlora.temporal import GATES, TemporalLoraConfig, gated_layers, set_frame_signals

QUANTIZATIONS = ("none", "nf4", "int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "family -> folder of its tiny model."
    made = {f: tmp_path_factory.mktemp(f) for f in ("smolvlm", "qwen2_vl", "idefics")}
    for family, folder in made.items(): tiny_models.build(family).save_pretrained(folder)
    return made


def base(folders, family="smolvlm", quantization="none"): return from_pretrained(folders[family], quantization, device="cpu").train()


def logits(model, family="smolvlm", z=None):
    batch = tiny_models.video_inputs(family)
    set_frame_signals(model, signals() if z is None else z)
    with torch.no_grad(): return model(**batch).logits


def attach(model, folder, trainable=False): return load_adapter(model, folder, trainable)


@pytest.mark.parametrize("gate", [*GATES, "none"])
@pytest.mark.parametrize("family,quantization", [("smolvlm", "none"), ("smolvlm", "nf4"), ("qwen2_vl", "int8"), ("idefics", "none")])
def test_a_saved_adapter_loads_to_the_bit(folders, family, quantization, gate, tmp_path):
    model = adapted(base(folders, family, quantization), gate)
    model.save_pretrained(tmp_path)
    again = attach(base(folders, family, quantization), tmp_path).train()
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert isinstance(again, PeftModel) and torch.equal(logits(again, family), logits(model, family))
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("gate", ["rank", "gradient"])
def test_training_resumed_from_a_saved_adapter_goes_on_to_the_bit(folders, gate, tmp_path):
    batch = tiny_models.video_inputs("smolvlm")

    def steps(model, n):
        for _ in range(n):
            _, grads = loss_and_gradients(model, batch, signals())
            for name, p in model.named_parameters():
                if name in grads: p.data -= .1*grads[name]
        return model
    whole = steps(adapted(base(folders), gate), 4)
    steps(adapted(base(folders), gate), 2).save_pretrained(tmp_path)
    resumed = steps(attach(base(folders), tmp_path, trainable=True).train(), 2)
    assert torch.equal(logits(whole), logits(resumed))


def test_peft_with_mmqlora_imported_loads_it_but_an_unwired_gate_never_runs_silently(folders, tmp_path):
    adapted(base(folders), "rank").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(folders), str(tmp_path))
    assert isinstance(model.peft_config["default"], TemporalLoraConfig)
    with pytest.raises(InputError, match="its gates are not wired"): model(**tiny_models.video_inputs("smolvlm"))
    mmqlora.wire_gates(model)
    logits(model)


def test_an_adapter_of_another_base_is_refused(folders, tmp_path):
    adapted(base(folders), "rank").save_pretrained(tmp_path)
    tensors = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    save_file({k: v for i, (k, v) in enumerate(tensors.items()) if i % 2}, tmp_path/"adapter_model.safetensors")
    with pytest.raises(InputError, match="tensors are missing"): attach(base(folders), tmp_path)


@pytest.mark.parametrize("gate", ["none", "gradient"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_merging_costs_what_it_says(folders, quantization, gate):
    model = adapted(base(folders, quantization=quantization), gate)
    before = logits(model)
    merged, error = merge(model)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    bound = {"none": (0, 1e-6), "nf4": (1e-3, 1.5), "int8": (1e-4, .2)}[quantization]
    assert bound[0] <= error <= bound[1], error
    after = logits(merged)
    assert torch.allclose(after, before, atol=1e-4) if quantization == "none" else not torch.equal(after, before)


def test_input_dependent_gates_refuse_to_merge_and_leave_the_base_alone(folders):
    for quantization in QUANTIZATIONS:
        for gate in ("scalar", "rank", "time"):
            model = adapted(base(folders, quantization=quantization), gate)
            weights = {n: float_weight(m.get_base_layer()).clone() for n, m in gated_layers(model).items()}
            for call in (merge, export_nowhere, lambda m: m.merge_adapter()):
                with pytest.raises(InputError, match="depend(s)? on the input"): call(model)
            assert all(torch.equal(float_weight(m.get_base_layer()), weights[n]) for n, m in gated_layers(model).items())


def export_nowhere(model): export(model, "/nonexistent")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merge_and_unmerge_give_the_base_back(folders, quantization):
    model = adapted(base(folders, quantization=quantization), "gradient")
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    close = 1e-4 if quantization == "none" else .5
    assert torch.allclose(logits(model), before, atol=close)


WITHOUT_US = """
import sys, torch, peft, transformers
from safetensors.torch import load_file, save_file
base, folder = sys.argv[1:]
def model(): return transformers.AutoModelForImageTextToText.from_pretrained(base).train()
try: peft.PeftModel.from_pretrained(model(), f"{folder}/gated")
except KeyError as err: assert err.args[0] == "TEMPORAL_LORA, which mmqlora.load loads", err
else: raise SystemExit("plain peft loaded a gated adapter")
out = {}
for gate in ("gradient", "rank"):
    plain = peft.PeftModel.from_pretrained(model(), f"{folder}/{gate}").train()
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad(): out[gate] = plain(**load_file(f"{folder}/batch.safetensors")).logits
assert "mmqlora" not in sys.modules
save_file(out, f"{folder}/logits.safetensors")
"""


def test_plain_peft_refuses_a_gated_adapter_and_loads_an_exported_one(folders, tmp_path):
    "Rank gates that learned only their bias, outside the text model, fold into lora_B."
    expected = {}
    for gate in ("gradient", "rank"):
        model = adapted(base(folders), gate, names=("lora_B",))
        for layer in gated_layers(model).values():
            if gate == "rank" and layer.space == "frame": layer.lora_gate["default"].data[:, 0] = torch.tensor([1., -.5])
        expected[gate] = logits(model)
        export(model, tmp_path/gate)
    fill(model).save_pretrained(tmp_path/"gated")
    stored = json.loads((tmp_path/"gated/adapter_config.json").read_text())
    assert stored["gate"] == "rank" and stored["signals"] == 2
    save_file(tiny_models.video_inputs("smolvlm"), tmp_path/"batch.safetensors")
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, str(folders["smolvlm"]), str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert not done.returncode, done.stderr[-2000:]
    theirs = load_file(tmp_path/"logits.safetensors")
    assert torch.equal(theirs["gradient"], expected["gradient"]) and torch.allclose(theirs["rank"], expected["rank"], atol=1e-5)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_plain_peft_stops_at_what_only_mmqlora_loads(folders, method, tmp_path):
    model = mmqlora.adapt(base(folders), method, {"text": 1})
    mmqlora.save_adapter(model, tmp_path)
    with pytest.raises(KeyError, match=f"{method.upper()}, which mmqlora.load loads"): PeftModel.from_pretrained(base(folders), str(tmp_path))
    mmqlora.load_adapter(base(folders), tmp_path)


def test_a_joint_adapter_loads_here_and_stops_plain_peft(folders, tmp_path):
    from mmqlora.joint import apply_bits
    name = next(iter(linears(base(folders))["text"]))
    model = mmqlora.adapt(apply_bits(base(folders), {name: "int8"}), "qlora", {"text": 2})
    mmqlora.save_adapter(fill(model), tmp_path)
    with pytest.raises(KeyError, match="JOINT, which mmqlora.load loads"): PeftModel.from_pretrained(base(folders), str(tmp_path))
    again = mmqlora.load_adapter(base(folders), tmp_path)
    assert torch.equal(logits(again.train()), logits(model.train()))


def test_what_cannot_be_merged_or_exported_says_why(folders, tmp_path):
    ia3 = mmqlora.adapt(base(folders), "ia3", {"text": 1})
    with pytest.raises(InputError, match="is IA3, not LoRA"): export(ia3, tmp_path)
    for model in (ia3, base(folders)):
        with pytest.raises(InputError, match="no LoRA adapter is active"): merge(model)
    with pytest.raises(InputError, match="adapter 'none': is not there"): export(adapted(base(folders), "none"), tmp_path, "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "frozen", "prefix", "bottleneck", "ia3", "dora"])
def test_a_gate_that_a_method_has_not_is_refused(folders, method):
    for gate, message in (("rank", f"{method} has no temporal gate"), ("wind", "unknown gate 'wind'")):
        for how in ("gate", "temporal"):
            with pytest.raises(InputError, match=message): mmqlora.adapt(base(folders), method, **{how: gate})


@pytest.mark.parametrize("rank,message", [(-1, "-1 is no rank"), (2.5, "2.5 is no rank"), ("8", "'8' is no rank"), (True, "True is no rank"), (10**6, "more than any")])
def test_a_rank_that_is_none_is_refused(folders, rank, message):
    for key in ("text", next(iter(linears(base(folders))["text"]))):
        with pytest.raises(InputError, match=message): mmqlora.adapt(base(folders), "lora", {key: rank})
    if rank != 10**6:
        with pytest.raises(InputError, match=message): mmqlora.adapt(base(folders), "bottleneck", {"text": rank})


def test_disabling_and_unloading_give_the_base_to_the_bit(folders):
    plain = base(folders, quantization="nf4")
    before = logits(plain)
    model = adapted(plain, "rank")
    with model.disable_adapter(): assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


class Clips(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return {"clip": i}


def together(rows, family="smolvlm"):
    "A batch as a data collator makes it: the signals travel with the clips."
    batch = tiny_models.video_inputs(family, [tiny_models.videos(4)[r["clip"]] for r in rows])
    return {**batch, "frame_signals": signals(len(rows), seed=rows[0]["clip"])}


def train_with(trainer, model):
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed and all("lora_" in n for n in changed) and any("lora_gate" in n for n in changed)


def arguments(cls, folder, **more):
    return cls(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
               remove_unused_columns=False, logging_steps=1, save_steps=2, disable_tqdm=True, **more)


def test_the_trainer_of_transformers_trains_saves_and_resumes(folders, tmp_path):
    from transformers import Trainer, TrainingArguments
    model = adapted(base(folders), "rank")
    train_with(Trainer(model, arguments(TrainingArguments, tmp_path), together, Clips()), model)
    assert (tmp_path/"checkpoint-2/adapter_model.safetensors").is_file()
    again = attach(base(folders), tmp_path/"checkpoint-2").train()
    assert torch.equal(logits(again), logits(model.train()))
    longer = arguments(TrainingArguments, tmp_path)
    longer.max_steps = 3
    fresh = adapted(base(folders), "rank")
    Trainer(fresh, longer, together, Clips()).train(resume_from_checkpoint=str(tmp_path/"checkpoint-2"))


def test_the_trainer_of_transformers_trains_in_bfloat16(folders, tmp_path):
    from transformers import Trainer, TrainingArguments
    model = adapted(base(folders, "qwen2_vl"), "rank")
    train_with(Trainer(model, arguments(TrainingArguments, tmp_path, bf16=True), lambda rows: together(rows, "qwen2_vl"), Clips()), model)


def test_the_sft_trainer_of_trl_trains(folders, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    model = adapted(base(folders), "rank")
    config = arguments(trl.SFTConfig, tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, gradient_checkpointing=False)
    tokenizer = mmqlora.processor(mmqlora.repo_path("models/base"))
    trainer = trl.SFTTrainer(model, config, data_collator=together, train_dataset=Dataset.from_list([{"clip": i} for i in range(4)]), processing_class=tokenizer)
    train_with(trainer, model)


def test_accelerate_prepares_it(folders):
    from accelerate import Accelerator
    model, optimizer = Accelerator(cpu=True).prepare(m := adapted(base(folders), "rank"), torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.1))
    loss, grads = loss_and_gradients(model, tiny_models.video_inputs("smolvlm"), signals())
    optimizer.step()
    assert torch.isfinite(loss) and grads


def test_one_call_loads_adapts_and_audits_any_family(folders):
    for family in folders:
        model = mmqlora.adapt(mmqlora.from_pretrained(folders[family], quantization="nf4", device="cpu"), ranks={"vision": 1, "fusion": 3, "text": 2}, temporal="gate")
        table = mmqlora.audit(model).set_index("modality")
        assert table["rank"].to_dict() == {"vision": 1, "fusion": 3, "text": 2} and set(table["bits"]) == {"4"}
        assert (table["modules"] == table["adapted"]).all() and (table[["params", "base_bytes", "adapter_bytes"]] > 0).all().all()
        assert torch.isfinite(logits(fill(model.train()), family)).all()


def test_only_safetensors_are_read_and_a_stranger_is_refused_before_loading(folders, tmp_path):
    with pytest.raises(InputError, match="not a model that transformers can load"): from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(InputError, match=r"declare MODALITIES\['blip-2'\]"): from_pretrained(tmp_path)
    assert settings(base(folders))["target_modules"] and linears(base(folders))
