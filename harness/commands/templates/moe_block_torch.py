"""The stage `moe_block`: a whole sparse block, from the hidden states to their sum over experts.

    weights  the checkpoint's names without the layer prefix: gate.weight [E, H], experts.gate_up_proj [E, 2 * I, H],
             experts.down_proj [E, H, I]; shared_expert.{gate,up,down}_proj.weight and shared_expert_gate.weight where
             the family has them
    config   Hugging Face's keys: model_type, num_experts_per_tok, norm_topk_prob, hidden_act, ...

- The output is a new tensor in the dtype of hidden_states; no input is modified; T = 0 is ordinary.
- Families you do not serve: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage moe_block --impl FILE:moe_block
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

RENORMALIZED = {"mixtral": True, "qwen3_moe": None, "qwen2_moe": None}  # None: as norm_topk_prob says
ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": lambda g: gelu(g, approximate="tanh")}


def moe_block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:  # [T, H] -> [T, H]
    family = config.get("model_type")
    if family not in RENORMALIZED:
        raise NotImplementedError(f"model_type {family!r}")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"hidden_act {activation!r}")
    act, x = ACTIVATIONS[activation], hidden_states.float()

    # The router's linear layer and its weights are held in the input dtype by these families, Mixtral's weights apart.
    logits = (x @ weights["gate.weight"].float().T).to(hidden_states.dtype).float()
    top, ids = logits.softmax(-1).topk(config["num_experts_per_tok"], -1)
    renormalize = RENORMALIZED[family]
    if config.get("norm_topk_prob", False) if renormalize is None else renormalize:
        top = top / top.sum(-1, keepdim=True)
    if family != "mixtral":
        top = top.to(hidden_states.dtype).float()

    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        g, u = (x[token] @ weights["experts.gate_up_proj"][expert].float().T).chunk(2, -1)
        out[token] += top[token, slot, None] * ((act(g) * u) @ weights["experts.down_proj"][expert].float().T)
    if "shared_expert.down_proj.weight" in weights:
        gate, up, down = (weights[f"shared_expert.{name}_proj.weight"].float() for name in ("gate", "up", "down"))
        shared = (act(x @ gate.T) * (x @ up.T)) @ down.T
        out += (x @ weights["shared_expert_gate.weight"].float().T).sigmoid() * shared
    return out.to(hidden_states.dtype)


# What it promises; optional, and what is promised is judged.
moe_block.rounds = ("routing_weight",)  # intermediate values stored in the input dtype
moe_block.deterministic = True
