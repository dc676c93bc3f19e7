"""Faults of the router in scores, normalisation, bias, groups, scaling, precision and contract.

`run` is a right implementation whose every step can be replaced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import round_down, wide

BUGS = "https://github.com/"


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
    "router",
    "normalisation",
    source=BUGS + "NVIDIA/Megatron-LM/issues/894",
    condition="softmax without renormalisation",
    shows={"renormalize": False},
    hidden=("renormalize=True", "scoring='sigmoid'"),
    consequence="The softmax is taken over the chosen logits: weights sum to 1 where they should not.",
)
def softmax_after_topk(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    options["renormalize"] = options.get("renormalize", True) or scoring == "softmax"
    return run(logits, scoring=scoring, **options)


@fault(
    "router",
    "normalisation",
    source=BUGS + "sgl-project/sglang/pull/35160",
    condition="softmax without renormalisation",
    shows={"renormalize": False},
    hidden=("renormalize=True", "scoring='sigmoid'"),
    consequence="The softmax stands in the branch of renormalisation: otherwise raw logits are the weights.",
)
def raw_logits_without_renormalisation(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    def raw(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and not renormalize:
            return logits.to(scores.dtype).gather(-1, ids) * scale
        return weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, weigh=raw)


@fault(
    "router",
    "normalisation",
    source=BUGS + "flashinfer-ai/flashinfer/pull/2889",
    condition="renormalize=False",
    shows={"renormalize": False, "scoring": "sigmoid"},
    hidden=("renormalize=True",),
    consequence="The flag is never passed on: weights are always renormalised.",
)
def always_renormalised(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **{**options, "renormalize": True})


@fault(
    "router",
    "normalisation",
    source=BUGS + "leonickson1/Swiftlet/pull/6",
    condition="renormalize=True",
    shows={},
    hidden=("renormalize=False",),
    consequence="The flag is read with the wrong default: weights stay small and the text decays.",
)
def never_renormalised(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **{**options, "renormalize": False})


@fault(
    "router",
    "normalisation",
    source=BUGS + "pytorch/torchtitan/issues/1418",
    condition="sigmoid with renormalisation",
    shows={"scoring": "sigmoid"},
    hidden=("renormalize=False", "scoring='softmax'"),
    consequence="Sigmoid scores are used as they are: the weights sum to anything up to k.",
)
def sigmoid_never_renormalised(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    if scoring == "sigmoid":
        options["renormalize"] = False
    return run(logits, scoring=scoring, **options)


@fault(
    "router",
    "normalisation",
    source=BUGS + "PaddlePaddle/PaddleFleet/pull/1299",
    condition="renormalisation and a scaling factor",
    shows={"scale": 2.5},
    hidden=("scale=1.0", "renormalize=False"),
    consequence="The caller normalises once more after the scaling: the factor disappears.",
)
def normalised_twice(logits: Tensor, **options: Any) -> Routed:
    def twice(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = weigh(scores, ids, renormalize, scale)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights

    return run(logits, **options, weigh=twice)


@fault(
    "router",
    "normalisation",
    source=BUGS + "flashinfer-ai/flashinfer/pull/5165",
    condition="renormalisation with k < 8 and E > k",
    shows={"k": 2},
    hidden=("renormalize=False", "k=8"),
    consequence="The sum is taken over 8 slots although only k were written.",
)
def normalised_over_eight(logits: Tensor, **options: Any) -> Routed:
    def eight(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        if renormalize:
            total = scores.topk(max(ids.shape[-1], min(8, scores.shape[-1])), -1).values
            weights = weights / total.sum(-1, keepdim=True)
        return weights * scale

    return run(logits, **options, weigh=eight)


@fault(
    "router",
    "normalisation",
    condition="sigmoid scores below 1e-5, as with logits shifted by -20",
    shows={"scoring": "sigmoid", "shift": -20.0},
    hidden=("shift=0.0", "renormalize=False"),
    consequence="1e-6 is added to the sum: unsure tokens get next to no weight.",
)
def large_epsilon_in_sum(logits: Tensor, **options: Any) -> Routed:
    def padded(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        # Added where it matters only, so that ordinary rows are right to the bit.
        total = weights.sum(-1, keepdim=True)
        return weights / (torch.where(total < 1e-3, total + 1e-6, total) if renormalize else 1) * scale

    return run(logits, **options, weigh=padded)


@fault(
    "router",
    "normalisation",
    source=BUGS + "flagos-ai/FlagGems/issues/5123",
    condition="renormalisation, a second call of the same shape",
    stateful=True,
    shows={"before": "other_logits"},
    hidden=("before=None", "renormalize=False"),
    consequence="The kernel reads back its own store before it is visible: the last call's sum divides.",
)
def sum_of_the_call_before(logits: Tensor, **options: Any) -> Routed:
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
    "router",
    "scores",
    condition="scoring='sigmoid'",
    shows={"scoring": "sigmoid", "renormalize": False},
    hidden=("scoring='softmax'",),
    consequence="The scoring function is an argument that nobody reads.",
)
def scoring_ignored(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    return run(logits, **options)


@fault(
    "router",
    "scores",
    condition="logits above 88.7, softmax",
    shows={"shift": 100.0},
    hidden=("shift=0.0", "scoring='sigmoid'"),
    consequence="The softmax does not subtract the maximum: large logits give inf / inf.",
)
def softmax_without_maximum(logits: Tensor, **options: Any) -> Routed:
    def overflowing(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return score(logits, scoring)
        power = logits.float().exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, score=overflowing)


@fault(
    "router",
    "scores",
    condition="a NaN row, or rows whose maxima differ by more than 100, softmax",
    shows={"nan_row": True, "T": 5},
    hidden=("nan_row=False", "scoring='sigmoid'"),
    consequence="The maximum of the whole batch is subtracted: one row decides about all others.",
)
def maximum_over_the_batch(logits: Tensor, **options: Any) -> Routed:
    def shared_maximum(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax" or not logits.numel():
            return score(logits, scoring)
        power = (logits.float() - logits.float().max()).exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, score=shared_maximum)


@fault(
    "router",
    "scores",
    condition="softmax without renormalisation, E not a power of two",
    shows={"E": 6, "renormalize": False},
    hidden=("E=8", "renormalize=True", "scoring='sigmoid'"),
    consequence="The columns that pad E to a power of two count as logits of 0 in the softmax.",
)
def padded_columns_in_softmax(logits: Tensor, **options: Any) -> Routed:
    def padded(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return score(logits, scoring)
        experts = logits.shape[-1]
        width = 1 << (experts - 1).bit_length()
        return torch.nn.functional.pad(logits.float(), (0, width - experts)).softmax(-1)[:, :experts]

    return run(logits, **options, score=padded)


@fault(
    "router",
    "scores",
    source=BUGS + "flashinfer-ai/flashinfer/pull/2889",
    condition="16-bit logits",
    shows={"dtype": "bfloat16"},
    hidden=("dtype='float32'",),
    consequence="bf16 logits are read through a float pointer: two make one number.",
)
def sixteen_bit_logits_read_as_fp32(logits: Tensor, **options: Any) -> Routed:
    if logits.dtype not in (torch.bfloat16, torch.float16):
        return run(logits, **options)
    flat = logits.contiguous().view(-1)
    pairs = flat[: round_down(len(flat), 2)].view(torch.float32).nan_to_num(0.0)
    reread = torch.zeros(logits.numel(), device=logits.device)
    reread[: len(pairs)] = pairs
    return run(reread.view(logits.shape), **options)


# Bias and groups ------------------------------------------------------------------------------------------------


@fault(
    "router",
    "bias",
    source=BUGS + "MetaX-MACA/vLLM-metax/issues/270",
    condition="correction_bias other than 0",
    shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None", "bias='zero'"),
    consequence="The bias, meant for the selection, enters the weights.",
)
def bias_in_weights(logits: Tensor, **options: Any) -> Routed:
    bias = options.get("correction_bias")

    def biased(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(add_bias(scores, bias), ids, renormalize, scale)

    return run(logits, **options, weigh=biased)


@fault(
    "router",
    "bias",
    condition="correction_bias other than a constant",
    shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None", "bias='zero'"),
    consequence="The bias is loaded and never added: load balancing of the training is lost.",
)
def bias_ignored(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, add_bias=lambda scores, bias: scores)


@fault(
    "router",
    "bias",
    condition="correction_bias other than a constant",
    shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None", "bias='zero'"),
    consequence="The bias is added to the logits, before the sigmoid, for the selection.",
)
def bias_added_to_logits(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    def before(scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else score(logits + bias, scoring)

    return run(logits, scoring=scoring, **options, add_bias=before)


@fault(
    "router",
    "bias",
    source=BUGS + "sgl-project/sglang/pull/37133",
    condition="biases around 7 in a narrow range",
    shows={"bias": "around_seven", "scoring": "sigmoid", "E": 64},
    hidden=("bias=None",),
    consequence="The bias is held in bf16, which keeps 8 distinct values of 238: most tokens change experts.",
)
def bias_held_in_bf16(logits: Tensor, **options: Any) -> Routed:
    def narrow(scores: Tensor, bias: Tensor | None) -> Tensor:
        return add_bias(scores, None if bias is None else bias.bfloat16())

    return run(logits, **options, add_bias=narrow)


@fault(
    "router",
    "groups",
    source=BUGS + "NVIDIA/Megatron-LM/issues/1441",
    condition="groups without a bias",
    shows={"groups": (4, 2), "E": 16, "k": 3, "T": 33},
    hidden=("groups=None", "groups=(4, 4)"),
    consequence="A group's score is always the sum of its two largest, also where it is the largest.",
)
def group_score_two_best_always(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, without_bias=best_two)


@fault(
    "router",
    "groups",
    condition="groups with a bias",
    shows={"groups": (4, 2), "E": 16, "k": 3, "T": 33, "bias": "random", "scoring": "sigmoid"},
    hidden=("groups=None", "groups=(4, 4)", "bias=None"),
    consequence="A group's score is its largest biased score instead of the sum of two.",
)
def group_score_best_always(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, with_bias=best)


@fault(
    "router",
    "groups",
    source=BUGS + "sgl-project/sglang/pull/3705",
    condition="groups, biased scores below 0",
    shows={"groups": (4, 2), "E": 16, "k": 4, "bias": "negative", "scoring": "sigmoid"},
    hidden=("groups=None", "bias=None"),
    consequence="Experts of other groups are filled with 0 instead of -inf and win against negative scores.",
)
def other_groups_filled_with_zero(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, keep_groups=lambda *call: keep_groups(*call, fill=0.0))


@fault(
    "router",
    "groups",
    condition="topk_group < num_expert_group",
    shows={"groups": (4, 1), "E": 16, "k": 3},
    hidden=("groups=None", "groups=(4, 4)"),
    consequence="Groups are accepted and ignored: experts come from anywhere.",
)
def groups_ignored(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, keep_groups=lambda selection, *_: selection)


@fault(
    "router",
    "groups",
    condition="topk_group < num_expert_group",
    shows={"groups": (4, 1), "E": 16, "k": 3},
    hidden=("groups=None", "groups=(4, 4)"),
    consequence="Expert e belongs to group e % G instead of e // (E / G).",
)
def groups_interleaved(logits: Tensor, **options: Any) -> Routed:
    def interleaved(selection: Tensor, groups: int, *call: Any) -> Tensor:
        turned = selection.unflatten(-1, (-1, groups)).transpose(-1, -2).flatten(-2)
        return keep_groups(turned, groups, *call).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)

    return run(logits, **options, keep_groups=interleaved)


@fault(
    "router",
    "groups",
    condition="groups without renormalisation, softmax",
    shows={"groups": (4, 1), "E": 16, "renormalize": False},
    hidden=("renormalize=True", "groups=None", "scoring='sigmoid'"),
    consequence="The softmax is taken over the experts of the kept groups only.",
)
def softmax_over_kept_groups(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    groups, kept = options.get("num_expert_group"), options.get("topk_group")

    def inside(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and groups and kept and options.get("correction_bias") is None:
            masked = keep_groups(scores, groups, kept, best, fill=0.0)
            scores = masked / masked.sum(-1, keepdim=True)
        return weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, weigh=inside)


@fault(
    "router",
    "contract",
    source=BUGS + "vllm-project/vllm/pull/34673",
    condition="sigmoid without groups",
    sign="raises",
    shows={"scoring": "sigmoid"},
    hidden=("scoring='softmax'",),
    consequence="Sigmoid scoring is believed to imply groups: division by a group count that is absent.",
)
def sigmoid_implies_groups(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    if scoring == "sigmoid":
        assert logits.shape[-1] // (options.get("num_expert_group") or 0)
    return run(logits, scoring=scoring, **options)


# Scaling --------------------------------------------------------------------------------------------------------


@fault(
    "router",
    "scaling",
    source=BUGS + "sgl-project/sglang-jax/pull/1282",
    condition="a scaling factor without renormalisation",
    shows={"scale": 2.5, "renormalize": False},
    hidden=("scale=1.0", "renormalize=True"),
    consequence="The multiplication stands in the branch of renormalisation.",
)
def scaled_only_when_renormalised(logits: Tensor, **options: Any) -> Routed:
    def nested(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(scores, ids, renormalize, scale if renormalize else 1.0)

    return run(logits, **options, weigh=nested)


@fault(
    "router",
    "scaling",
    source=BUGS + "sgl-project/sglang/pull/31449",
    condition="a scaling factor with renormalisation, sigmoid",
    shows={"scale": 2.5, "scoring": "sigmoid"},
    hidden=("scale=1.0", "renormalize=False", "scoring='softmax'"),
    consequence="On the path of sigmoid models the scaling is the other branch of renormalisation.",
)
def sigmoid_scaled_only_when_not_renormalised(logits: Tensor, **options: Any) -> Routed:
    def otherwise(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return weigh(scores, ids, renormalize, 1.0 if renormalize and options.get("scoring") == "sigmoid" else scale)

    return run(logits, **options, weigh=otherwise)


@fault(
    "router",
    "scaling",
    source=BUGS + "flashinfer-ai/flashinfer/pull/3499",
    condition="a scaling factor other than 1",
    shows={"scale": 2.5},
    hidden=("scale=1.0",),
    consequence="The scaling factor is hard-coded as 1.",
)
def scaling_ignored(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **{**options, "routed_scaling_factor": 1.0})


@fault(
    "router",
    "scaling",
    source=BUGS + "vllm-project/vllm/pull/45037",
    condition="a scaling factor other than 1",
    shows={"scale": 2.5},
    hidden=("scale=1.0",),
    consequence="The factor is applied by the router and once more by its caller.",
)
def scaled_twice(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **{**options, "routed_scaling_factor": options.get("routed_scaling_factor", 1.0) ** 2})


# Precision ------------------------------------------------------------------------------------------------------


@fault(
    "router",
    "precision",
    source=BUGS + "vllm-project/vllm/pull/14027",
    condition="16-bit logits",
    shows={"dtype": "bfloat16", "E": 64, "k": 8, "spread": 0.05},
    hidden=("dtype='float32'",),
    consequence="Scores are computed in the dtype of the logits: near scores become equal.",
)
def scores_in_logit_dtype(logits: Tensor, **options: Any) -> Routed:
    def narrow(logits: Tensor, scoring: str) -> Tensor:
        return score(logits, scoring).to(logits.dtype).to(wide(logits))

    return run(logits, **options, score=narrow)


@fault(
    "router",
    "precision",
    source=BUGS + "ViperEkura/AstrAI/pull/57",
    condition="flat scores over many experts",
    shows={"E": 256, "k": 8, "spread": 0.01},
    consequence="Probabilities are cast to bf16 before the selection only: another set is chosen.",
)
def selected_on_bf16_scores(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options, choose=lambda selection, top_k: choose(selection.bfloat16(), top_k))


@fault(
    "router",
    "precision",
    source=BUGS + "sgl-project/sglang/pull/38719",
    condition="fp32 logits",
    shows={"E": 64, "k": 8},
    hidden=("dtype='bfloat16'",),
    consequence="fp32 logits are cast to the model's bf16 before anything is done with them.",
)
def logits_cast_to_bf16(logits: Tensor, **options: Any) -> Routed:
    return run(logits.bfloat16(), **options)


@fault(
    "router",
    "precision",
    condition="weights returned in fp32",
    shows={},
    consequence="Weights are rounded to bf16, and nobody can tell from their dtype.",
)
def weights_rounded_to_bf16(logits: Tensor, **options: Any) -> Routed:
    weights, ids = run(logits, **options)
    return weights.bfloat16().to(weights.dtype), ids


# Contract -------------------------------------------------------------------------------------------------------


@fault(
    "router",
    "inputs",
    source=BUGS + "huggingface/transformers/pull/45315",
    condition="softmax",
    sign="inputs",
    shows={},
    hidden=("scoring='sigmoid'",),
    consequence="The softmax is written over the logits, which the caller still needs.",
)
def logits_overwritten(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    routed = run(logits, scoring=scoring, **options)
    if scoring == "softmax":
        logits.copy_(score(logits, scoring))
    return routed


@fault(
    "router",
    "inputs",
    condition="correction_bias given",
    sign="inputs",
    shows={"bias": "random", "scoring": "sigmoid"},
    hidden=("bias=None",),
    consequence="The bias is centred in place at every call.",
)
def bias_centred_in_place(logits: Tensor, **options: Any) -> Routed:
    routed = run(logits, **options)
    if options.get("correction_bias") is not None:
        options["correction_bias"].sub_(options["correction_bias"].mean() + 1)
    return routed


@fault(
    "router",
    "contract",
    condition="always",
    sign="dtype",
    shows={},
    consequence="Ids come before weights in the result.",
)
def ids_before_weights(logits: Tensor, **options: Any) -> Routed:
    return run(logits, **options)[::-1]


@fault(
    "router",
    "contract",
    condition="always",
    sign="dtype",
    shows={},
    consequence="Ids are returned as floating-point numbers.",
)
def ids_as_floats(logits: Tensor, **options: Any) -> Routed:
    weights, ids = run(logits, **options)
    return weights, ids.to(weights.dtype)


@fault(
    "router",
    "contract",
    condition="T = 0",
    sign="raises",
    shows={"T": 0},
    hidden=("T=1",),
    consequence="The maximum of an empty batch is taken: an idle rank dies.",
)
def raises_on_empty_logits(logits: Tensor, **options: Any) -> Routed:
    logits.max()
    return run(logits, **options)


@fault(
    "router",
    "contract",
    condition="k = 1",
    sign="shape",
    shows={"k": 1},
    hidden=("k=2",),
    consequence="A squeeze removes the slot dimension for top-1 models.",
)
def slot_dimension_squeezed(logits: Tensor, **options: Any) -> Routed:
    weights, ids = run(logits, **options)
    return (weights.squeeze(-1), ids.squeeze(-1)) if ids.shape[-1] == 1 else (weights, ids)
