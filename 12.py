# %% [code] id=ae027c5c
#| default_exp cost

# %% [markdown] id=6836dd9f
# Cost

> What a run costs: parameters, bytes, seconds, as measured.

# %% [code] id=e486da81
#| export
import resource

from mmqlora.ranks import storage_bytes, trainable

# %% [code] id=df1a9991
import torch
from fastcore.test import test_eq
from torch import nn

# %% [markdown] id=3add397d
Bytes are counted from the tensors themselves, quantization state included; the peak of the resident set is
the operating system's own figure for the whole process, so it also holds Python and the libraries.

# %% [code] id=a52676b8
#| export
def optimizer_bytes(optimizer) -> int:
    "Bytes of an optimizer's state."
    tensors = [v for slot in optimizer.state.values() for v in slot.values() if hasattr(v, "element_size")]
    return sum(t.numel()*t.element_size() for t in tensors)

def peak_rss_bytes() -> int:
    "Largest resident set of this process so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def cost_of(model, optimizer=None, seconds:float=0., steps:int=0, eval_seconds:float=0.) -> dict:
    "The cost record of one trained model."
    count = trainable(model)
    return dict(trainable_params=count, trainable_bytes=4*count, model_bytes=storage_bytes(model),
                adapter_bytes=sum(p.numel()*p.element_size() for n, p in model.named_parameters() if "lora_" in n),
                optimizer_bytes=optimizer_bytes(optimizer) if optimizer else 0, train_seconds=round(seconds, 2),
                step_ms=round(1000*seconds/steps, 2) if steps else 0., eval_seconds=round(eval_seconds, 2),
                peak_rss_bytes=peak_rss_bytes())

# %% [code] id=61b3fd7b
model = nn.Linear(10, 10)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 10)).sum().backward(); optimizer.step()
cost = cost_of(model, optimizer, seconds=2., steps=100)
test_eq(cost["trainable_params"], 110); test_eq(cost["model_bytes"], 440)
test_eq(cost["optimizer_bytes"], 2*440 + 2*4)                            # two moments, and a step count per tensor
test_eq(cost["step_ms"], 20.)
cost
