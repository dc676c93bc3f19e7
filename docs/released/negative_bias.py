"""vLLM 0.22.1: fused_topk_bias gives one expert several times where every biased score of a row is negative.

Needs a CUDA device.  With E 128 or 256 and the same bias the result is right; with E 3, 5, 7, 72, 160, 257 it is not.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias

torch.manual_seed(0)
experts, top_k = 7, 4
logits = torch.randn(1, experts, device="cuda")
bias = torch.full((experts,), -3.0, device="cuda")
_, ids = fused_topk_bias(
    hidden_states=logits, gating_output=logits, scoring_func="sigmoid", e_score_correction_bias=bias, topk=top_k,
    renormalize=True,
)  # fmt: skip
wanted = (logits.sigmoid() + bias).topk(top_k).indices
print("got", ids.tolist(), "wanted", wanted.tolist())
assert sorted(ids[0].tolist()) == sorted(wanted[0].tolist())
