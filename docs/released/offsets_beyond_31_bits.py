"""vLLM 0.22.1: from T * E = 2^31 logits on, fused_topk gives rows the ids of other rows.

Needs a CUDA device with 20 GB free.  Rows from 2^31 / 512 = 4,194,304 on are wrong.
"""

import torch
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

torch.manual_seed(0)
tokens, experts, top_k = 5_000_000, 512, 8
logits = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
ids = fused_topk(logits, logits, top_k, True)[1]
for row in (0, 4_194_303, 4_194_304, tokens - 1):
    found = logits[row, ids[row]].float().sort(descending=True).values
    wanted = logits[row].float().topk(top_k).values  # ids among equal logits may differ, their logits not
    print(row, "right" if torch.equal(found, wanted) else f"ids {ids[row].tolist()} are not the {top_k} best")
    assert torch.equal(found, wanted)
