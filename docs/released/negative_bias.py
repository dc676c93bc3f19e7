"""vLLM 0.22.1: fused_topk_bias gives one expert several times where every biased score of a row is negative.

Needs a CUDA device.  With E 128 or 256 and the same bias the result is right; with E 3, 5, 7, 72, 160, 257 it is not.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias

torch.manual_seed(0)
logits = torch.randn(1, 7, device="cuda")
bias = torch.full((7,), -3.0, device="cuda")
ids = fused_topk_bias(logits, logits, "sigmoid", bias, topk=4, renormalize=True)[1]
wanted = (logits.sigmoid() + bias).topk(4).indices
print("got", ids.tolist(), "wanted", wanted.tolist())
assert sorted(ids[0].tolist()) == sorted(wanted[0].tolist())
