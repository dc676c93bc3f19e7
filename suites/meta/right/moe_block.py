"""Right sparse-MoE blocks as strangers write them: one for the Qwen families and one for all."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu_pytorch_tanh": lambda g: F.gelu(g, approximate="tanh")}
NORM_BY_DEFAULT = {"qwen3_next": True, "deepseek_v3": True, "mixtral": True}
TOP_K = {
    "qwen2_moe": 4, "qwen3_moe": 8, "qwen3_next": 10, "qwen3_omni_moe_talker_text": 8, "mixtral": 2, "deepseek_v3": 8,
}  # fmt: skip


def _mlp(x, gate, up, down, act):
    return (act(x @ gate.float().mT) * (x @ up.float().mT)) @ down.float().mT


def _experts(x, weights, topk_weights, ids, act):
    w13, w2 = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    half = w13.shape[1] // 2
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        t, j = torch.where(ids == e)
        y = _mlp(x[t], w13[e, :half], w13[e, half:], w2[e], act)
        out.index_add_(0, t, y * topk_weights[t, j, None].float())
    return out


def _shared(x, weights, act):
    for prefix in ("shared_expert", "shared_experts"):
        if f"{prefix}.down_proj.weight" in weights:
            projections = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            y = _mlp(x, *projections, act)
            if f"{prefix}_gate.weight" in weights:
                y = y * torch.sigmoid(x @ weights[f"{prefix}_gate.weight"].float().mT)
            return y
    return 0.0


def qwen(hidden_states, weights, config):
    """The Qwen families and nothing else; routing weights in fp32, sums in fp32."""
    kind = config["model_type"]
    if not kind.startswith("qwen"):
        raise NotImplementedError(f"model_type {kind!r}")
    x = hidden_states.float()
    logits = (x @ weights["gate.weight"].float().mT).to(hidden_states.dtype)
    scores = torch.softmax(logits.float(), dim=-1)
    topk_weights, ids = scores.topk(config.get("num_experts_per_tok", TOP_K[kind]), dim=-1)
    if config.get("norm_topk_prob", NORM_BY_DEFAULT.get(kind, False)):
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    act = ACTIVATIONS[config.get("hidden_act", "silu")]
    out = _experts(x, weights, topk_weights, ids, act) + _shared(x, weights, act)
    return out.to(hidden_states.dtype)


def every_family(hidden_states, weights, config):
    """All families; routed and shared output are rounded to the model's dtype before they are added."""
    x = hidden_states.float()
    kind, dtype = config["model_type"], hidden_states.dtype
    logits = x @ weights["gate.weight"].float().mT
    if not kind.startswith("deepseek"):
        logits = logits.to(dtype).float()
    topk_weights, ids = _deepseek(logits, weights, config) if kind.startswith("deepseek") else _plain(logits, config)
    if kind.startswith("qwen"):
        topk_weights = topk_weights.to(dtype)
    act = ACTIVATIONS[config.get("hidden_act", "silu")]
    out = _experts(x, weights, topk_weights, ids, act).to(dtype)
    shared = _shared(x, weights, act)
    return out + shared.to(dtype) if isinstance(shared, torch.Tensor) else out


def _plain(logits, config):
    kind = config["model_type"]
    topk_weights, ids = torch.softmax(logits, dim=-1).topk(config.get("num_experts_per_tok", TOP_K[kind]), dim=-1)
    norm = kind == "mixtral" or config.get("norm_topk_prob", NORM_BY_DEFAULT.get(kind, False))
    return (topk_weights / topk_weights.sum(-1, keepdim=True) if norm else topk_weights), ids


def _deepseek(logits, weights, config):
    v3 = config["model_type"] == "deepseek_v3"
    scores = torch.sigmoid(logits) if v3 else torch.softmax(logits, dim=-1)
    choice = scores + weights["gate.e_score_correction_bias"].float() if v3 else scores
    T, E = scores.shape
    if v3 or config.get("topk_method", "greedy") != "greedy":
        groups, kept = config.get("n_group", 8 if v3 else None), config.get("topk_group", 4 if v3 else None)
        if groups and kept:
            grouped = choice.view(T, groups, E // groups)
            rank = grouped.topk(2, dim=-1).values.sum(-1) if v3 else grouped.amax(-1)
            mask = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(kept, dim=-1).indices, True)
            choice = grouped.masked_fill(~mask[..., None], float("-inf")).reshape(T, E)
    ids = choice.topk(config.get("num_experts_per_tok") or TOP_K[config["model_type"]], dim=-1).indices
    topk_weights = scores.gather(1, ids)
    if v3 and config.get("norm_topk_prob", True):
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_weights * config.get("routed_scaling_factor", 2.5 if v3 else 1.0), ids
