"""Right routers as strangers write them: other orders, other dtypes of the ids, other ways to break ties."""

import torch


def _scores(logits, scoring="softmax", **options):
    logits = logits.float()
    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    raise NotImplementedError(f"scoring {scoring!r}")


def _selection(scores, correction_bias=None, num_expert_group=None, topk_group=None, **options):
    """What experts are chosen by; -inf outside the best groups."""
    choice = scores if correction_bias is None else scores + correction_bias.float()[None]
    if not num_expert_group or not topk_group:
        return choice
    T, E = choice.shape
    grouped = choice.view(T, num_expert_group, E // num_expert_group)
    if correction_bias is None:
        rank = grouped.max(dim=-1).values
    else:
        rank = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    keep = torch.zeros_like(rank, dtype=torch.bool)
    keep.scatter_(1, rank.topk(topk_group, dim=-1).indices, True)
    return torch.where(keep[..., None], grouped, torch.full_like(grouped, float("-inf"))).reshape(T, E)


def _finish(weights, renormalize=True, routed_scaling_factor=1.0, **options):
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor


def plain_topk(logits, *, top_k, **options):
    """torch.topk, int64 ids, best first."""
    scores = _scores(logits, **options)
    ids = _selection(scores, **options).topk(top_k, dim=-1).indices
    return _finish(scores.gather(1, ids), **options), ids


def lowest_index_first(logits, *, top_k, **options):
    """A stable descending sort: among equals the lowest id wins.  int32 ids."""
    scores = _scores(logits, **options)
    choice = _selection(scores, **options)
    ids = choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return _finish(scores.gather(1, ids), **options), ids.int()


lowest_index_first.deterministic = True


def highest_index_first(logits, *, top_k, **options):
    """Among equals the highest id wins; the worst of the chosen comes first."""
    scores = _scores(logits, **options)
    choice = _selection(scores, **options)
    ids = choice.argsort(dim=-1, stable=True)[:, choice.shape[1] - top_k :]
    return _finish(scores.gather(1, ids), **options), ids


def ids_ascending(logits, *, top_k, **options):
    """Slots in the order of the ids, and weights gathered after that."""
    scores = _scores(logits, **options)
    choice = _selection(scores, **options)
    ids = choice.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
    return _finish(scores.gather(1, ids), **options), ids.to(torch.int32)


def topk_of_logits(
    logits, *, top_k, scoring="softmax", renormalize=True, routed_scaling_factor=1.0, correction_bias=None,
    num_expert_group=None, **options,
):  # fmt: skip
    """Top-k of the logits and a softmax over the chosen: right only where weights are renormalised."""
    if scoring != "softmax" or not renormalize or correction_bias is not None or num_expert_group:
        raise NotImplementedError("only plain softmax routing with renormalisation")
    best, ids = logits.float().topk(top_k, dim=-1)
    return torch.softmax(best, dim=-1) * routed_scaling_factor, ids


def weights_in_logit_dtype(logits, *, top_k, **options):
    """fp32 inside, weights handed over in the dtype of the logits, but for fp16, where small scores would vanish."""
    weights, ids = plain_topk(logits, top_k=top_k, **options)
    return (weights if logits.dtype == torch.float16 else weights.to(logits.dtype)), ids


def repeated_argmax(logits, *, top_k, **options):
    """One expert after the other, the chosen one taken out by its index; NaN counts as the smallest."""
    scores = _scores(logits, **options)
    choice = _selection(scores, **options)
    choice = torch.nan_to_num(choice, nan=-3e38, neginf=-3e38)
    taken = torch.zeros_like(choice, dtype=torch.bool)
    ids = []
    for _ in range(top_k):
        best = choice.masked_fill(taken, float("-inf")).argmax(dim=-1, keepdim=True)
        taken = taken.scatter(1, best, True)
        ids.append(best)
    ids = torch.cat(ids, dim=1)
    return _finish(scores.gather(1, ids), **options), ids


def softmax_by_hand(logits, *, top_k, scoring="softmax", renormalize=True, routed_scaling_factor=1.0, **options):
    """exp(x - max) and a multiplication with the reciprocal."""
    x = logits.to(torch.float32)
    if scoring == "softmax":
        p = torch.exp(x - x.amax(dim=-1, keepdim=True))
        scores = p * (1.0 / p.sum(dim=-1, keepdim=True))
    else:
        scores = 1.0 / (1.0 + torch.exp(-x))
    ids = _selection(scores, **options).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights * (routed_scaling_factor / weights.sum(-1, keepdim=True))
        return weights, ids
    return weights * routed_scaling_factor, ids


def weights_rounded_early(logits, *, top_k, routed_scaling_factor=1.0, **options):
    """Weights rounded to the dtype of the logits, then scaled and handed over in fp32."""
    scores = _scores(logits, **options)
    ids = _selection(scores, **options).topk(top_k, dim=-1).indices
    weights = _finish(scores.gather(1, ids), **options).to(logits.dtype)
    return weights.float() * routed_scaling_factor, ids


weights_rounded_early.rounds = ("routing_weight",)


def sigmoid_by_tanh(logits, *, top_k, scoring="softmax", **options):
    """(1 + tanh(x / 2)) / 2, as kernels with a fast tanh have it: scores far below 1 lose their digits."""
    x = logits.float()
    scores = torch.softmax(x, dim=-1) if scoring == "softmax" else 0.5 * torch.tanh(0.5 * x) + 0.5
    ids = _selection(scores, **options).topk(top_k, dim=-1).indices
    return _finish(scores.gather(1, ids), **options), ids


def only_bf16(logits, *, top_k, **options):
    """Declares one dtype, and breaks on any other."""
    assert logits.dtype == torch.bfloat16
    return plain_topk(logits, top_k=top_k, **options)


only_bf16.dtypes = ("bf16",)
