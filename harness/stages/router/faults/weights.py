"""Faults of the router in scores, normalisation, bias, groups, scaling, precision and contract.

`run` is a right implementation whose every step can be replaced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import round_down, wide

# Right steps ----------------------------------------------------------------------------------------------------


def score(logits: Tensor, scoring: str) -> Tensor:
    """Scores over all experts, in fp32 or wider."""
    logits = logits.to(wide(logits))
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}")
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def add_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    """What the selection looks at."""
    return scores if bias is None else scores + bias.to(scores.dtype)


def best(grouped: Tensor) -> Tensor:
    """Score of a group: its largest."""
    return grouped.amax(-1)


def best_two(grouped: Tensor) -> Tensor:
    """Score of a group: the sum of its two largest."""
    return grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)


def keep_groups(
    selection: Tensor, groups: int, kept: int, group_score: Callable[[Tensor], Tensor], fill: float = -torch.inf
) -> Tensor:
    """Fill the experts of all but the `kept` best groups, so that they are not chosen."""
    grouped = selection.unflatten(-1, (groups, -1))
    chosen = group_score(grouped).topk(kept, -1).indices
    allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=selection.device).scatter(-1, chosen, True)
    return torch.where(allowed[..., None], grouped, fill).flatten(-2)


def choose(selection: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest."""
    return selection.topk(top_k, -1).indices


def weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
    """Weights of the chosen experts."""
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale


def run(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
    score: Callable[[Tensor, str], Tensor] = score,
    add_bias: Callable[[Tensor, Tensor | None], Tensor] = add_bias,
    without_bias: Callable[[Tensor], Tensor] = best,
    with_bias: Callable[[Tensor], Tensor] = best_two,
    keep_groups: Callable[..., Tensor] = keep_groups,
    choose: Callable[[Tensor, int], Tensor] = choose,
    weigh: Callable[[Tensor, Tensor, bool, float], Tensor] = weigh,
) -> tuple[Tensor, Tensor]:
    """A right implementation; every keyword after `routed_scaling_factor` replaces one of its steps."""
    scores = score(router_logits, scoring)
    selection = add_bias(scores, correction_bias)
    if num_expert_group is not None and topk_group is not None:
        group_score = without_bias if correction_bias is None else with_bias
        selection = keep_groups(selection, num_expert_group, topk_group, group_score)
    ids = choose(selection, top_k)
    return weigh(scores, ids, renormalize, routed_scaling_factor), ids


Routed = tuple[Tensor, Tensor]


# Scores and normalisation ---------------------------------------------------------------------------------------


@fault(
    "normalisation", source="NVIDIA/Megatron-LM/issues/894", condition="softmax without renormalisation",
    shows={"renormalize": False}, hidden=("renormalize=True", "scoring='sigmoid'"),
)  # fmt: skip
def softmax_after_topk(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The softmax is taken over the chosen logits: weights sum to 1 where they should not."""
    options["renormalize"] = options.get("renormalize", True) or scoring == "softmax"
    return run(logits, scoring=scoring, **options)


@fault(
    "normalisation", source="sgl-project/sglang/pull/35160", condition="softmax without renormalisation",
    shows={"renormalize": False}, hidden=("renormalize=True", "scoring='sigmoid'"),
)  # fmt: skip
def raw_logits_without_renormalisation(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The softmax stands in the branch of renormalisation: otherwise raw logits are the weights."""

    def raw(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and not renormalize:
            return logits.to(scores.dtype).gather(-1, ids) * scale
        return weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, weigh=raw)


@fault(
    "normalisation", source="flashinfer-ai/flashinfer/pull/2889", condition="renormalize=False",
    shows={"renormalize": False, "scoring": "sigmoid"}, hidden=("renormalize=True",),
)  # fmt: skip
def always_renormalised(logits: Tensor, **options: Any) -> Routed:
    """The flag is never passed on: weights are always renormalised."""
    return run(logits, **{**options, "renormalize": True})


@fault(
    "normalisation", source="leonickson1/Swiftlet/pull/6", condition="renormalize=True", hidden=("renormalize=False",)
)
def never_renormalised(logits: Tensor, **options: Any) -> Routed:
    """The flag is read with the wrong default: weights stay small and the text decays."""
    return run(logits, **{**options, "renormalize": False})


@fault(
    "normalisation", source="pytorch/torchtitan/issues/1418", condition="sigmoid with renormalisation",
    shows={"scoring": "sigmoid"}, hidden=("renormalize=False", "scoring='softmax'"),
)  # fmt: skip
def sigmoid_never_renormalised(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """Sigmoid scores are used as they are: the weights sum to anything up to k."""
    if scoring == "sigmoid":
        options["renormalize"] = False
    return run(logits, scoring=scoring, **options)


@fault(
    "normalisation", source="PaddlePaddle/PaddleFleet/pull/1299", condition="renormalisation and a scaling factor",
    shows={"scale": 2.5}, hidden=("scale=1.0", "renormalize=False"),
)  # fmt: skip
def normalised_twice(logits: Tensor, **options: Any) -> Routed:
    """The caller normalises once more after the scaling: the factor disappears."""

    def twice(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = weigh(scores, ids, renormalize, scale)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights

    return run(logits, **options, weigh=twice)


@fault(
    "normalisation", source="flashinfer-ai/flashinfer/pull/5165", condition="renormalisation with k < 8 and E > k",
    shows={"k": 2}, hidden=("renormalize=False", "k=8"),
)  # fmt: skip
def normalised_over_eight(logits: Tensor, **options: Any) -> Routed:
    """The sum is taken over 8 slots although only k were written."""

    def eight(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        if renormalize:
            total = scores.topk(max(ids.shape[-1], min(8, scores.shape[-1])), -1).values
            weights = weights / total.sum(-1, keepdim=True)
        return weights * scale

    return run(logits, **options, weigh=eight)


@fault(
    "normalisation", condition="sigmoid scores below 1e-5, as with logits shifted by -20",
    shows={"scoring": "sigmoid", "shift": -20.0}, hidden=("shift=0.0", "renormalize=False"),
)  # fmt: skip
def large_epsilon_in_sum(logits: Tensor, **options: Any) -> Routed:
    """1e-6 is added to the sum: unsure tokens get next to no weight."""

    def padded(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        # Added where it matters only, so that ordinary rows are right to the bit.
        total = weights.sum(-1, keepdim=True)
        return weights / (torch.where(total < 1e-3, total + 1e-6, total) if renormalize else 1) * scale

    return run(logits, **options, weigh=padded)


@fault(
    "normalisation", source="flagos-ai/FlagGems/issues/5123",
    condition="renormalisation, a second call of the same shape", shows={"before": "other_logits"}, stateful=True,
    hidden=("before=None", "renormalize=False"),
)  # fmt: skip
def sum_of_the_call_before(logits: Tensor, **options: Any) -> Routed:
    """The kernel reads back its own store before it is visible: the last call's sum divides."""

    def stale(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        if not renormalize:
            return weights * scale
        key = (tuple(ids.shape), scores.device, scores.dtype)
        total = weights.sum(-1, keepdim=True)
        before = _sums.get(key, total)
        _sums[key] = total
        return weights / before * scale

    return run(logits, **options, weigh=stale)


_sums: dict[tuple[Any, ...], Tensor] = {}  # the memory that `sum_of_the_call_before` fails to synchronise


@fault(
    "scores", condition="scoring='sigmoid'", shows={"scoring": "sigmoid", "renormalize": False},
    hidden=("scoring='softmax'",),
)  # fmt: skip
def scoring_ignored(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The scoring function is an argument that nobody reads."""
    return run(logits, **options)


@fault(
    "scores", condition="logits above 88.7, softmax", shows={"shift": 100.0}, hidden=("shift=0.0", "scoring='sigmoid'")
)
def softmax_without_maximum(logits: Tensor, **options: Any) -> Routed:
    """The softmax does not subtract the maximum: large logits give inf / inf."""

    def overflowing(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return score(logits, scoring)
        power = logits.float().exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, score=overflowing)


@fault(
    "scores", condition="a NaN row, or rows whose maxima differ by more than 100, softmax",
    shows={"nan_row": True, "T": 5}, hidden=("nan_row=False", "scoring='sigmoid'"),
)  # fmt: skip
def maximum_over_the_batch(logits: Tensor, **options: Any) -> Routed:
    """The maximum of the whole batch is subtracted: one row decides about all others."""

    def shared_maximum(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax" or not logits.numel():
            return score(logits, scoring)
        power = (logits.float() - logits.float().max()).exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, score=shared_maximum)


@fault(
    "scores", condition="softmax without renormalisation, E not a power of two", shows={"E": 6, "renormalize": False},
    hidden=("E=8", "renormalize=True", "scoring='sigmoid'"),
)  # fmt: skip
def padded_columns_in_softmax(logits: Tensor, **options: Any) -> Routed:
    """The columns that pad E to a power of two count as logits of 0 in the softmax."""

    def padded(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return score(logits, scoring)
        experts = logits.shape[-1]
        width = 1 << (experts - 1).bit_length()
        return torch.nn.functional.pad(logits.float(), (0, width - experts)).softmax(-1)[:, :experts]

    return run(logits, **options, score=padded)


@fault(
    "scores", source="flashinfer-ai/flashinfer/pull/2889", condition="16-bit logits", shows={"dtype": "bfloat16"},
    hidden=("dtype='float32'",),
)  # fmt: skip
def sixteen_bit_logits_read_as_fp32(logits: Tensor, **options: Any) -> Routed:
    """bf16 logits are read through a float pointer: two make one number."""
    if logits.dtype not in (torch.bfloat16, torch.float16):
        return run(logits, **options)
    flat = logits.contiguous().view(-1)
    pairs = flat[: round_down(len(flat), 2)].view(torch.float32).nan_to_num(0.0)
    reread = torch.zeros(logits.numel(), device=logits.device)
    reread[: len(pairs)] = pairs
    return run(reread.view(logits.shape), **options)


# Bias and groups ------------------------------------------------------------------------------------------------


@fault(
    "bias", source="MetaX-MACA/vLLM-metax/issues/270", condition="correction_bias other than 0",
    shows={"bias": "random", "scoring": "sigmoid"}, hidden=("bias=None", "bias='zero'"),
)  # fmt: skip
def bias_in_weights(logits: Tensor, **options: Any) -> Routed:
    """The bias, meant for the selection, enters the weights."""
    bias = options.get("correction_bias")

    def biased(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(add_bias(scores, bias), ids, renormalize, scale)

    return run(logits, **options, weigh=biased)


@fault(
    "bias", condition="correction_bias other than a constant", shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None", "bias='zero'"),
)  # fmt: skip
def bias_ignored(logits: Tensor, **options: Any) -> Routed:
    """The bias is loaded and never added: load balancing of the training is lost."""
    return run(logits, **options, add_bias=lambda scores, bias: scores)


@fault(
    "bias", condition="correction_bias other than a constant", shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None", "bias='zero'"),
)  # fmt: skip
def bias_added_to_logits(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The bias is added to the logits, before the sigmoid, for the selection."""

    def before(scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else score(logits + bias, scoring)

    return run(logits, scoring=scoring, **options, add_bias=before)


@fault(
    "bias", source="sgl-project/sglang/pull/37133", condition="biases around 7 in a narrow range",
    shows={"bias": "around_seven", "scoring": "sigmoid", "E": 64}, hidden=("bias=None",),
)  # fmt: skip
def bias_held_in_bf16(logits: Tensor, **options: Any) -> Routed:
    """The bias is held in bf16, which keeps 8 distinct values of 238: most tokens change experts."""

    def narrow(scores: Tensor, bias: Tensor | None) -> Tensor:
        return add_bias(scores, None if bias is None else bias.bfloat16())

    return run(logits, **options, add_bias=narrow)


@fault(
    "groups", source="NVIDIA/Megatron-LM/issues/1441", condition="groups without a bias",
    shows={"groups": (4, 2), "E": 16, "k": 3, "T": 33}, hidden=("groups=None", "groups=(4, 4)"),
)  # fmt: skip
def group_score_two_best_always(logits: Tensor, **options: Any) -> Routed:
    """A group's score is always the sum of its two largest, also where it is the largest."""
    return run(logits, **options, without_bias=best_two)


@fault(
    "groups", condition="groups with a bias",
    shows={"groups": (4, 2), "E": 16, "k": 3, "T": 33, "bias": "random", "scoring": "sigmoid"},
    hidden=("groups=None", "groups=(4, 4)", "bias=None"),
)  # fmt: skip
def group_score_best_always(logits: Tensor, **options: Any) -> Routed:
    """A group's score is its largest biased score instead of the sum of two."""
    return run(logits, **options, with_bias=best)


@fault(
    "groups", source="sgl-project/sglang/pull/3705", condition="groups, biased scores below 0",
    shows={"groups": (4, 2), "E": 16, "k": 4, "bias": "negative", "scoring": "sigmoid"},
    hidden=("groups=None", "bias=None"),
)  # fmt: skip
def other_groups_filled_with_zero(logits: Tensor, **options: Any) -> Routed:
    """Experts of other groups are filled with 0 instead of -inf and win against negative scores."""
    return run(logits, **options, keep_groups=lambda *call: keep_groups(*call, fill=0.0))


@fault(
    "groups", condition="topk_group < num_expert_group", shows={"groups": (4, 1), "E": 16, "k": 3},
    hidden=("groups=None", "groups=(4, 4)"),
)  # fmt: skip
def groups_ignored(logits: Tensor, **options: Any) -> Routed:
    """Groups are accepted and ignored: experts come from anywhere."""
    return run(logits, **options, keep_groups=lambda selection, *_: selection)


@fault(
    "groups", condition="topk_group < num_expert_group", shows={"groups": (4, 1), "E": 16, "k": 3},
    hidden=("groups=None", "groups=(4, 4)"),
)  # fmt: skip
def groups_interleaved(logits: Tensor, **options: Any) -> Routed:
    """Expert e belongs to group e % G instead of e // (E / G)."""

    def interleaved(selection: Tensor, groups: int, *call: Any) -> Tensor:
        turned = selection.unflatten(-1, (-1, groups)).transpose(-1, -2).flatten(-2)
        return keep_groups(turned, groups, *call).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)

    return run(logits, **options, keep_groups=interleaved)


@fault(
    "groups", condition="groups without renormalisation, softmax",
    shows={"groups": (4, 1), "E": 16, "renormalize": False},
    hidden=("renormalize=True", "groups=None", "scoring='sigmoid'"),
)  # fmt: skip
def softmax_over_kept_groups(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The softmax is taken over the experts of the kept groups only."""
    groups, kept = options.get("num_expert_group"), options.get("topk_group")

    def inside(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and groups and kept and options.get("correction_bias") is None:
            masked = keep_groups(scores, groups, kept, best, fill=0.0)
            scores = masked / masked.sum(-1, keepdim=True)
        return weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, weigh=inside)


@fault(
    "contract", source="vllm-project/vllm/pull/34673", condition="sigmoid without groups",
    shows={"scoring": "sigmoid"}, sign="raises", hidden=("scoring='softmax'",),
)  # fmt: skip
def sigmoid_implies_groups(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """Sigmoid scoring is believed to imply groups: division by a group count that is absent."""
    if scoring == "sigmoid":
        assert logits.shape[-1] // (options.get("num_expert_group") or 0)
    return run(logits, scoring=scoring, **options)


# Scaling --------------------------------------------------------------------------------------------------------


@fault(
    "scaling", source="sgl-project/sglang-jax/pull/1282", condition="a scaling factor without renormalisation",
    shows={"scale": 2.5, "renormalize": False}, hidden=("scale=1.0", "renormalize=True"),
)  # fmt: skip
def scaled_only_when_renormalised(logits: Tensor, **options: Any) -> Routed:
    """The multiplication stands in the branch of renormalisation."""

    def nested(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(scores, ids, renormalize, scale if renormalize else 1.0)

    return run(logits, **options, weigh=nested)


@fault(
    "scaling", source="sgl-project/sglang/pull/31449", condition="a scaling factor with renormalisation, sigmoid",
    shows={"scale": 2.5, "scoring": "sigmoid"}, hidden=("scale=1.0", "renormalize=False", "scoring='softmax'"),
)  # fmt: skip
def sigmoid_scaled_only_when_not_renormalised(logits: Tensor, **options: Any) -> Routed:
    """On the path of sigmoid models the scaling is the other branch of renormalisation."""

    def otherwise(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(scores, ids, renormalize, 1.0 if renormalize and options.get("scoring") == "sigmoid" else scale)

    return run(logits, **options, weigh=otherwise)


@fault(
    "scaling", source="flashinfer-ai/flashinfer/pull/3499", condition="a scaling factor other than 1",
    shows={"scale": 2.5}, hidden=("scale=1.0",),
)  # fmt: skip
def scaling_ignored(logits: Tensor, **options: Any) -> Routed:
    """The scaling factor is hard-coded as 1."""
    return run(logits, **{**options, "routed_scaling_factor": 1.0})


@fault(
    "scaling", source="vllm-project/vllm/pull/45037", condition="a scaling factor other than 1", shows={"scale": 2.5},
    hidden=("scale=1.0",),
)  # fmt: skip
def scaled_twice(logits: Tensor, **options: Any) -> Routed:
    """The factor is applied by the router and once more by its caller."""
    return run(logits, **{**options, "routed_scaling_factor": options.get("routed_scaling_factor", 1.0) ** 2})


# Precision ------------------------------------------------------------------------------------------------------


@fault(
    "precision", source="vllm-project/vllm/pull/14027", condition="16-bit logits",
    shows={"dtype": "bfloat16", "E": 64, "k": 8, "spread": 0.05}, hidden=("dtype='float32'",),
)  # fmt: skip
def scores_in_logit_dtype(logits: Tensor, **options: Any) -> Routed:
    """Scores are computed in the dtype of the logits: near scores become equal."""

    def narrow(logits: Tensor, scoring: str) -> Tensor:
        return score(logits, scoring).to(logits.dtype).to(wide(logits))

    return run(logits, **options, score=narrow)


@fault(
    "precision", source="ViperEkura/AstrAI/pull/57", condition="flat scores over many experts",
    shows={"E": 256, "k": 8, "spread": 0.01},
)  # fmt: skip
def selected_on_bf16_scores(logits: Tensor, **options: Any) -> Routed:
    """Probabilities are cast to bf16 before the selection only: another set is chosen."""
    return run(logits, **options, choose=lambda selection, top_k: choose(selection.bfloat16(), top_k))


@fault(
    "precision", source="sgl-project/sglang/pull/38719", condition="fp32 logits", shows={"E": 64, "k": 8},
    hidden=("dtype='bfloat16'",),
)  # fmt: skip
def logits_cast_to_bf16(logits: Tensor, **options: Any) -> Routed:
    """fp32 logits are cast to the model's bf16 before anything is done with them."""
    return run(logits.bfloat16(), **options)


@fault("precision", condition="weights returned in fp32")
def weights_rounded_to_bf16(logits: Tensor, **options: Any) -> Routed:
    """Weights are rounded to bf16, and nobody can tell from their dtype."""
    weights, ids = run(logits, **options)
    return weights.bfloat16().to(weights.dtype), ids


# Contract -------------------------------------------------------------------------------------------------------


@fault(
    "inputs", source="huggingface/transformers/pull/45315", condition="softmax", sign="inputs",
    hidden=("scoring='sigmoid'",),
)  # fmt: skip
def logits_overwritten(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The softmax is written over the logits, which the caller still needs."""
    routed = run(logits, scoring=scoring, **options)
    if scoring == "softmax":
        logits.copy_(score(logits, scoring))
    return routed


@fault(
    "inputs", condition="correction_bias given", shows={"bias": "random", "scoring": "sigmoid"}, sign="inputs",
    hidden=("bias=None",),
)  # fmt: skip
def bias_centred_in_place(logits: Tensor, **options: Any) -> Routed:
    """The bias is centred in place at every call."""
    routed = run(logits, **options)
    if options.get("correction_bias") is not None:
        options["correction_bias"].sub_(options["correction_bias"].mean() + 1)
    return routed


@fault("contract", sign="dtype")
def ids_before_weights(logits: Tensor, **options: Any) -> Routed:
    """Ids come before weights in the result."""
    return run(logits, **options)[::-1]


@fault("contract", sign="dtype")
def ids_as_floats(logits: Tensor, **options: Any) -> Routed:
    """Ids are returned as floating-point numbers."""
    weights, ids = run(logits, **options)
    return weights, ids.to(weights.dtype)


@fault("contract", condition="T = 0", shows={"T": 0}, sign="raises", hidden=("T=1",))
def raises_on_empty_logits(logits: Tensor, **options: Any) -> Routed:
    """The maximum of an empty batch is taken: an idle rank dies."""
    logits.max()
    return run(logits, **options)


@fault("contract", condition="k = 1", shows={"k": 1}, sign="shape", hidden=("k=2",))
def slot_dimension_squeezed(logits: Tensor, **options: Any) -> Routed:
    """A squeeze removes the slot dimension for top-1 models."""
    weights, ids = run(logits, **options)
    return (weights.squeeze(-1), ids.squeeze(-1)) if ids.shape[-1] == 1 else (weights, ids)
