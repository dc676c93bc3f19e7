"""What a right result of the stage `router` may be, from the error model of core/bounds."""

from math import sqrt

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import ACCUMULATOR


def score_error(logits: Tensor, scoring: str) -> Tensor:
    """Largest error of an fp32 score relative to its value, [T, E]; a score under the smallest normal may be 0."""
    x = logits.double()
    if scoring == "softmax":
        largest = x.amax(-1, keepdim=True)
        distance = (x - largest).abs().nan_to_num(nan=0.0, posinf=0.0)  # exp(-inf) is 0 without error
        of_logsumexp = largest.abs().nan_to_num(nan=0.0, posinf=0.0)  # where the score is exp(x - logsumexp(x))
        return ACCUMULATOR * (6 + distance + of_logsumexp + sqrt(x.shape[-1]) * 2)
    return ACCUMULATOR * (6 + x.abs().nan_to_num(nan=0.0, posinf=0.0))


def score_slack(scores: Tensor, logits: Tensor, scoring: str) -> Tensor:
    """Largest error of an fp32 score in fp64, [T, E].

    A sigmoid as (1 + tanh(x / 2)) / 2, which shipped kernels use, is good to a roundoff of 1 and not of its own value.
    """
    slack = scores * score_error(logits, scoring)
    return slack + (2 * ACCUMULATOR if scoring == "sigmoid" else 0.0)


def agreement_limit(logits: list[Tensor], scoring: str, top_k: int, dtypes: list[torch.dtype]) -> float:
    """How far the weights of two right results may be apart, relative to their size, for one choice of experts.

    Args:
        logits: those of both calls.
        dtypes: the formats that a weight was rounded to.
    """
    of_scores = max(float(score_error(x, scoring).max()) for x in logits)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 4 * of_scores + 2 * (top_k + 4) * ACCUMULATOR + unit
