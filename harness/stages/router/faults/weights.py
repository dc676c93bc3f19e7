"""Faults of the router in scores, normalisation and scaling."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import round_down
from moe_harness.harness.stages.router.faults._steps import (
    RIGHT,
    Routed,
    Steps,
    run,
)

# Scores and normalisation ---------------------------------------------------------------------------------------


@fault(
    "normalisation", source="NVIDIA/Megatron-LM/issues/894", condition="softmax without renormalisation",
    shows={"renorm": False}, hidden=("renorm=1", "scoring=sigmoid"),
)  # fmt: skip
def softmax_after_topk(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The softmax is taken over the chosen logits: weights sum to 1 where they should not."""
    options["renormalize"] = options.get("renormalize", True) or scoring == "softmax"
    return run(logits, scoring=scoring, **options)


@fault(
    "normalisation", source="sgl-project/sglang/pull/35160", condition="softmax without renormalisation",
    shows={"renorm": False}, hidden=("renorm=1", "scoring=sigmoid"),
)  # fmt: skip
def raw_logits_without_renormalisation(
    logits: Tensor, *, scoring: str = "softmax", steps: Steps = RIGHT, **options: Any
) -> Routed:
    """The softmax stands in the branch of renormalisation: otherwise raw logits are the weights."""

    def raw(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        if scoring == "softmax" and not renormalize:
            return logits.to(scores.dtype).gather(-1, ids) * scale
        return steps.weigh(scores, ids, renormalize, scale)

    return run(logits, scoring=scoring, **options, steps=steps, weigh=raw)


@fault(
    "normalisation", source="flashinfer-ai/flashinfer/pull/2889", condition="renormalize=False",
    shows={"renorm": False, "scoring": "sigmoid"}, hidden=("renorm=1",),
)  # fmt: skip
def always_renormalised(logits: Tensor, **options: Any) -> Routed:
    """The flag is never passed on: weights are always renormalised."""
    return run(logits, **{**options, "renormalize": True})


@fault("normalisation", source="leonickson1/Swiftlet/pull/6", condition="renormalize=True", hidden=("renorm=0",))
def never_renormalised(logits: Tensor, **options: Any) -> Routed:
    """The flag is read with the wrong default: weights stay small and the text decays."""
    return run(logits, **{**options, "renormalize": False})


@fault(
    "normalisation", source="pytorch/torchtitan/issues/1418", condition="sigmoid with renormalisation",
    shows={"scoring": "sigmoid"}, hidden=("renorm=0", "scoring=softmax"),
)  # fmt: skip
def sigmoid_never_renormalised(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """Sigmoid scores are used as they are: the weights sum to anything up to k."""
    if scoring == "sigmoid":
        options["renormalize"] = False
    return run(logits, scoring=scoring, **options)


@fault(
    "normalisation", source="PaddlePaddle/PaddleFleet/pull/1299", condition="renormalisation and a scaling factor",
    shows={"scale": 2.5}, hidden=("scale=1.0", "renorm=0"),
)  # fmt: skip
def normalised_twice(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The caller normalises once more after the scaling: the factor disappears."""

    def twice(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = steps.weigh(scores, ids, renormalize, scale)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights

    return run(logits, **options, steps=steps, weigh=twice)


@fault(
    "normalisation", source="flashinfer-ai/flashinfer/pull/5165", condition="renormalisation with k < 8 and E > k",
    shows={"k": 2}, hidden=("renorm=0", "k=8"),
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
    "normalisation", condition="sigmoid scores below 1e-5, as with logits around -12",
    shows={"scoring": "sigmoid", "data": "far_negative", "E": 12, "k": 2}, hidden=("data=normal", "renorm=0"),
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
    condition="renormalisation, a second call of the same shape", before={"seed": 1}, stateful=True,
    hidden=("renorm=0",),
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
    "scores", condition="scoring='sigmoid'", shows={"scoring": "sigmoid", "renorm": False},
    hidden=("scoring=softmax",),
)  # fmt: skip
def scoring_ignored(logits: Tensor, *, scoring: str = "softmax", **options: Any) -> Routed:
    """The scoring function is an argument that nobody reads."""
    return run(logits, **options)


@fault(
    "scores", condition="logits above 88.7, softmax", shows={"data": "overflow"},
    hidden=("data=normal", "scoring=sigmoid"),
)  # fmt: skip
def softmax_without_maximum(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The softmax does not subtract the maximum: large logits give inf / inf."""

    def overflowing(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return steps.score(logits, scoring)
        power = logits.float().exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, steps=steps, score=overflowing)


@fault(
    "scores", condition="a NaN row, or rows whose maxima differ by more than 100, softmax",
    shows={"data": "nan_row", "T": 5}, hidden=("data=normal", "scoring=sigmoid"),
)  # fmt: skip
def maximum_over_the_batch(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The maximum of the whole batch is subtracted: one row decides about all others."""

    def shared_maximum(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax" or not logits.numel():
            return steps.score(logits, scoring)
        power = (logits.float() - logits.float().max()).exp()
        return power / power.sum(-1, keepdim=True)

    return run(logits, **options, steps=steps, score=shared_maximum)


@fault(
    "scores", condition="softmax without renormalisation, E not a power of two",
    shows={"E": 6, "k": 2, "renorm": False}, hidden=("E=8", "renorm=1", "scoring=sigmoid"),
)  # fmt: skip
def padded_columns_in_softmax(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The columns that pad E to a power of two count as logits of 0 in the softmax."""

    def padded(logits: Tensor, scoring: str) -> Tensor:
        if scoring != "softmax":
            return steps.score(logits, scoring)
        experts = logits.shape[-1]
        width = 1 << (experts - 1).bit_length()
        return torch.nn.functional.pad(logits.float(), (0, width - experts)).softmax(-1)[:, :experts]

    return run(logits, **options, steps=steps, score=padded)


@fault(
    "scores", source="flashinfer-ai/flashinfer/pull/2889", condition="16-bit logits", shows={"dtype": "bf16"},
    hidden=("dtype=fp32",),
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


# Scaling --------------------------------------------------------------------------------------------------------


@fault(
    "scaling", source="sgl-project/sglang-jax/pull/1282", condition="a scaling factor without renormalisation",
    shows={"scale": 2.5, "renorm": False}, hidden=("scale=1.0", "renorm=1"),
)  # fmt: skip
def scaled_only_when_renormalised(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The multiplication stands in the branch of renormalisation."""

    def nested(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return steps.weigh(scores, ids, renormalize, scale if renormalize else 1.0)

    return run(logits, **options, steps=steps, weigh=nested)


@fault(
    "scaling", source="sgl-project/sglang/pull/31449", condition="a scaling factor with renormalisation, sigmoid",
    shows={"scale": 2.5, "scoring": "sigmoid"}, hidden=("scale=1.0", "renorm=0", "scoring=softmax"),
)  # fmt: skip
def sigmoid_scaled_only_when_not_renormalised(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """On the path of sigmoid models the scaling is the other branch of renormalisation."""

    def otherwise(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        return steps.weigh(
            scores, ids, renormalize, 1.0 if renormalize and options.get("scoring") == "sigmoid" else scale
        )

    return run(logits, **options, steps=steps, weigh=otherwise)


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
