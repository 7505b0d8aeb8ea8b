import torch, types
import mmqlora.blocks as b
# force the compiled path on the CPU, incl. calls from Function.backward
import inspect
for name in ("rms_norm","rms_norm_grad","swiglu","swiglu_grad","rope"):
    kernel = inspect.getclosurevars(getattr(b,name)).nonlocals["kernel"]
    setattr(b, name, kernel)
from mmqlora.benchmark import *
import mmqlora.lowmem as lm
for f in (8, 4, 6):
    m = build_model("qwen2.5-vl-7b","cpu",torch.bfloat16,small=True)
    loss,opt = set_up(m,"ours")
    for i in range(2):
        v = loss(make_batch(m, f, "cpu", torch.bfloat16, side=56)); v.backward(); print(f, v.item(), sum(p.grad.float().norm() for p in m.parameters() if p.grad is not None).item())
print(torch._dynamo.utils.counters["frames"], torch._dynamo.utils.counters["recompiles"] if "recompiles" in torch._dynamo.utils.counters else "")
