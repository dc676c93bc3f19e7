"""A router with its own sigmoid.

Mistake: exp(x) / (1 + exp(x)) is infinite over infinite from a logit of 89 on.
"""


def router(
    logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
    topk_group=None, routed_scaling_factor=1.0,
):  # fmt: skip
    if num_expert_group or topk_group:
        raise NotImplementedError("no groups")
    x = logits.float()
    scores = x.softmax(-1) if scoring == "softmax" else x.exp() / (1 + x.exp())
    choice = scores if correction_bias is None else scores + correction_bias
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids
