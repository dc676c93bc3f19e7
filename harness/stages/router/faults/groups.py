"""Faults of the router in the correction bias and in groups of experts."""

from typing import Any

from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.router.faults._steps import (
    RIGHT,
    Routed,
    Steps,
    add_bias,
    best,
    best_two,
    keep_groups,
    run,
)


@fault(
    "bias", source="MetaX-MACA/vLLM-metax/issues/270", condition="correction_bias other than 0",
    shows={"bias": "small", "scoring": "sigmoid"}, hidden=("bias=none", "bias=zero"),
)  # fmt: skip
def bias_in_weights(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The bias, meant for the selection, enters the weights."""
    bias = options.get("correction_bias")

    def biased(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return steps.weigh(add_bias(scores, bias), ids, renormalize, scale)

    return run(logits, **options, steps=steps, weigh=biased)


@fault(
    "bias", condition="correction_bias other than a constant", shows={"bias": "small", "scoring": "sigmoid"},
    hidden=("bias=none", "bias=zero"),
)  # fmt: skip
def bias_ignored(logits: Tensor, **options: Any) -> Routed:
    """The bias is loaded and never added: load balancing of the training is lost."""
    return run(logits, **options, add_bias=lambda scores, bias: scores)


@fault(
    "bias", condition="correction_bias other than a constant", shows={"bias": "small", "scoring": "sigmoid"},
    hidden=("bias=none", "bias=zero"),
)  # fmt: skip
def bias_added_to_logits(logits: Tensor, *, scoring: str = "softmax", steps: Steps = RIGHT, **options: Any) -> Routed:
    """The bias is added to the logits, before the sigmoid, for the selection."""

    def before(scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else steps.score(logits + bias, scoring)

    return run(logits, scoring=scoring, **options, steps=steps, add_bias=before)


@fault(
    "bias", source="sgl-project/sglang/pull/37133", condition="biases around 7 in a narrow range",
    shows={"bias": "offset", "scoring": "sigmoid", "E": 64}, hidden=("bias=none",),
)  # fmt: skip
def bias_held_in_bf16(logits: Tensor, **options: Any) -> Routed:
    """The bias is held in bf16, which keeps 8 distinct values of 238: most tokens change experts."""

    def narrow(scores: Tensor, bias: Tensor | None) -> Tensor:
        return add_bias(scores, None if bias is None else bias.bfloat16())

    return run(logits, **options, add_bias=narrow)


@fault(
    "groups", source="NVIDIA/Megatron-LM/issues/1441", condition="groups without a bias",
    shows={"groups": "4x2", "E": 16, "k": 3, "T": 33}, hidden=("groups=none", "groups=4x4"),
)  # fmt: skip
def group_score_two_best_always(logits: Tensor, **options: Any) -> Routed:
    """A group's score is always the sum of its two largest, also where it is the largest."""
    return run(logits, **options, without_bias=best_two)


@fault(
    "groups", condition="groups with a bias",
    shows={"groups": "4x2", "E": 16, "k": 3, "T": 33, "bias": "small", "scoring": "sigmoid"},
    hidden=("groups=none", "groups=4x4", "bias=none"),
)  # fmt: skip
def group_score_best_always(logits: Tensor, **options: Any) -> Routed:
    """A group's score is its largest biased score instead of the sum of two."""
    return run(logits, **options, with_bias=best)


@fault(
    "groups", source="sgl-project/sglang/pull/3705", condition="groups, biased scores below 0",
    shows={"groups": "4x2", "E": 16, "k": 4, "bias": "negative", "scoring": "sigmoid"},
    hidden=("groups=none", "bias=none"),
)  # fmt: skip
def other_groups_filled_with_zero(logits: Tensor, **options: Any) -> Routed:
    """Experts of other groups are filled with 0 instead of -inf and win against negative scores."""
    return run(logits, **options, keep_groups=lambda *call: keep_groups(*call, fill=0.0))


@fault(
    "groups", condition="topk_group < num_expert_group", shows={"groups": "4x1", "E": 16, "k": 3},
    hidden=("groups=none", "groups=4x4"),
)  # fmt: skip
def groups_ignored(logits: Tensor, **options: Any) -> Routed:
    """Groups are accepted and ignored: experts come from anywhere."""
    return run(logits, **options, keep_groups=lambda selection, *_: selection)


@fault(
    "groups", condition="topk_group < num_expert_group", shows={"groups": "4x1", "E": 16, "k": 3},
    hidden=("groups=none", "groups=4x4"),
)  # fmt: skip
def groups_interleaved(logits: Tensor, **options: Any) -> Routed:
    """Expert e belongs to group e % G instead of e // (E / G)."""

    def interleaved(selection: Tensor, groups: int, *call: Any) -> Tensor:
        turned = selection.unflatten(-1, (-1, groups)).transpose(-1, -2).flatten(-2)
        return keep_groups(turned, groups, *call).unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)

    return run(logits, **options, keep_groups=interleaved)


@fault(
    "groups", condition="groups without renormalisation, softmax",
    shows={"groups": "4x1", "E": 16, "k": 2, "renorm": False},
    hidden=("renorm=1", "groups=none", "scoring=sigmoid"),
)  # fmt: skip
def softmax_over_kept_groups(
    logits: Tensor, *, scoring: str = "softmax", steps: Steps = RIGHT, **options: Any
) -> Routed:
    """The softmax is taken over the experts of the kept groups only."""
    groups, kept = options.get("num_expert_group"), options.get("topk_group")

    def inside(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and groups and kept and options.get("correction_bias") is None:
            masked = keep_groups(scores, groups, kept, best, fill=0.0)
            scores = masked / masked.sum(-1, keepdim=True)
        return steps.weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, steps=steps, weigh=inside)


@fault(
    "contract", source="vllm-project/vllm/pull/34673", condition="sigmoid without groups",
    shows={"scoring": "sigmoid"}, sign="raises", hidden=("scoring=softmax",),
)  # fmt: skip
def sigmoid_implies_groups(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """Sigmoid scoring is believed to imply groups: division by a group count that is absent."""
    if scoring == "sigmoid":
        assert logits.shape[-1] // (options.get("num_expert_group") or 0)
    return run(logits, scoring=scoring, **options)
