"""vLLM 0.22.1: grouped_topk reads a strided or expanded correction bias as if it were contiguous.

Needs a CUDA device.  A defect, or a check of strides that is missing.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

torch.manual_seed(0)
logits = torch.randn(16, 64, device="cuda")
bias = torch.randn(64, 2, device="cuda")[:, 0]  # every second element
rule = {"topk": 8, "renormalize": True, "num_expert_group": 8, "topk_group": 4, "scoring_func": "sigmoid"}
strided, contiguous = (
    grouped_topk(hidden_states=logits, gating_output=logits, e_score_correction_bias=b, **rule)[1].sort().values
    for b in (bias, bias.contiguous())
)
print("rows with other experts:", int((strided != contiguous).any(-1).sum()), "of 16")
assert torch.equal(strided, contiguous)
