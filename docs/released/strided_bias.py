"""vLLM 0.22.1: grouped_topk reads a strided or expanded correction bias as if it were contiguous.

Needs a CUDA device.  A defect, or a check of strides that is missing.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

torch.manual_seed(0)
logits = torch.randn(16, 64, device="cuda")
bias = torch.randn(64, 2, device="cuda")[:, 0]  # every second element
rule = {"num_expert_group": 8, "topk_group": 4, "scoring_func": "sigmoid"}
strided = grouped_topk(logits, logits, 8, True, e_score_correction_bias=bias, **rule)[1].sort().values
packed = grouped_topk(logits, logits, 8, True, e_score_correction_bias=bias.contiguous(), **rule)[1].sort().values
print("rows with other experts:", int((strided != packed).any(-1).sum()), "of 16")
assert torch.equal(strided, packed)
