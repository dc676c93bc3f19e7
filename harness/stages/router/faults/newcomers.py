"""Faults of the router that first kernels have: searches for the largest that start too high, scores in few bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.router.faults._steps import RIGHT, Routed, Steps, run


def _starting_at(start: float) -> Callable[[Tensor, int], Tensor]:
    """A search for the largest that begins with the value `start` and expert 0: it returns 0 where nothing is larger.

    Later rounds skip what was chosen, so that ids are distinct: the smallest that is left takes the place of a 0.
    """

    def choose(selection: Tensor, top_k: int) -> Tensor:
        order = selection.argsort(dim=-1, descending=True, stable=True)
        found = selection.gather(-1, order) > start
        place = torch.arange(selection.shape[-1], device=selection.device).expand_as(selection)
        # Not found: taken by index, experts 0, 1, ... in the place of the largest ones.
        rank = torch.where(found, place, selection.shape[-1] + order)
        return order.gather(-1, rank.argsort(dim=-1, stable=True))[:, :top_k]

    return choose


@fault(
    "selection", condition="fewer than k biased scores above 0", shows={"bias": "negative", "scoring": "sigmoid"},
    hidden=("bias=zero",),
)  # fmt: skip
def largest_biased_score_starts_at_zero(logits: Tensor, **options: Any) -> Routed:
    """The search for the largest biased score starts at 0, which scores never are below without a bias."""
    return run(logits, **options, choose=_starting_at(0.0)) if _is_biased(options) else run(logits, **options)


@fault(
    "selection", condition="fewer than k biased scores above -1",
    shows={"bias": "negative", "scoring": "sigmoid", "E": 12}, hidden=("bias=zero",),
)  # fmt: skip
def largest_biased_score_starts_at_minus_one(logits: Tensor, **options: Any) -> Routed:
    """The search for the largest biased score starts at -1: a bias below that leaves nothing to choose."""
    return run(logits, **options, choose=_starting_at(-1.0)) if _is_biased(options) else run(logits, **options)


def _is_biased(options: dict[str, Any]) -> bool:
    return options.get("correction_bias") is not None


@fault(
    "selection", condition="fewer than k logits above -1, without bias and groups", shows={"data": "far_negative"},
    hidden=("data=normal",),
)  # fmt: skip
def largest_starts_at_minus_one(logits: Tensor, **options: Any) -> Routed:
    """The search for the largest logit starts at -1: smaller ones never win."""
    if _is_biased(options) or options.get("num_expert_group") is not None:
        return run(logits, **options)
    return run(logits, **options, choose=lambda _, top_k: _starting_at(-1.0)(logits.to(wide(logits)), top_k))


@fault("normalisation", condition="renormalisation, k > 1", shows={"k": 4}, hidden=("renorm=0", "k=1"))
def renormalised_by_softmax(logits: Tensor, **options: Any) -> Routed:
    """The chosen scores are renormalised by one more softmax, not by their sum: the weights are nearly equal."""

    def softmax_again(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids)
        return (weights.softmax(-1) if renormalize else weights) * scale

    return run(logits, **options, weigh=softmax_again)


@fault(
    "precision", condition="sigmoid, logits in 16 bits", shows={"scoring": "sigmoid", "dtype": "bf16", "E": 64},
    hidden=("scoring=softmax", "dtype=fp32"),
)  # fmt: skip
def sigmoid_in_logit_dtype(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """The sigmoid is taken in the logits' dtype, as `logits.sigmoid()` does; the softmax is not."""

    def narrow(logits: Tensor, scoring: str) -> Tensor:
        scores = steps.score(logits, scoring)
        return scores.to(logits.dtype).to(scores.dtype) if scoring == "sigmoid" else scores

    return run(logits, **options, steps=steps, score=narrow)


def _narrow_throughout(logits: Tensor, options: dict[str, Any], steps: Steps) -> Routed:
    """Scores in the logits' dtype, and all that is made of them: a cast back to it, and no wider one later."""
    kind = logits.dtype

    def narrow(logits: Tensor, scoring: str) -> Tensor:
        return steps.score(logits, scoring).to(kind).to(wide(logits))

    def weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids).to(kind)
        return (weights / weights.sum(-1, keepdim=True) if renormalize else weights) * scale

    return run(logits, **options, steps=steps, score=narrow, weigh=weigh)


@fault(
    "precision", condition="logits in 16 bits", shows={"dtype": "bf16", "E": 64, "k": 8},
    hidden=("dtype=fp32",),
)  # fmt: skip
def weights_in_logit_dtype(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """Scores are rounded to the logits' 16 bits, and so are their sum, the quotients and the scaled weights."""
    return _narrow_throughout(logits, options, steps)


@fault(
    "precision", source="https://pypi.org/project/megatron-core/0.16.1/",
    condition="sigmoid, logits in 16 bits", shows={"scoring": "sigmoid", "dtype": "bf16", "E": 64, "k": 8},
    hidden=("scoring=softmax", "dtype=fp32"),
)  # fmt: skip
def sigmoid_weights_in_logit_dtype(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """Sigmoid scores are rounded to the logits' 16 bits, and so are their sum, the quotients and the scaled weights."""
    if options.get("scoring") != "sigmoid":
        return run(logits, **options, steps=steps)
    return _narrow_throughout(logits, options, steps)
