"""Which tokens may be drawn where several logits equal the top_k-th."""

import pytest
import torch

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.stages.sampler.stage import STAGE, allowed


def draw(logits, *, temperature, top_k=None, top_p=None, seeds, positions, beyond=0):
    """Keeps all logits that equal the top_k-th, as vLLM does, and so many tokens `beyond` what top_p keeps."""
    scores = logits.double() / torch.where(temperature > 0, temperature, 1).double()[:, None]
    if top_k is not None:
        last = torch.where(top_k < 1, logits.shape[1], top_k).long().clamp(max=logits.shape[1]) - 1
        edge = scores.sort(dim=1, descending=True).values.gather(1, last[:, None])
        scores = scores.masked_fill(scores < edge, -torch.inf)
    p, order = scores.softmax(1).sort(dim=1, descending=True, stable=True)
    cut = p.cumsum(1) - p >= (1 if top_p is None else top_p.double()[:, None])
    kept = (~cut & (p > 0)).sum(1).clamp(min=1)
    last = torch.where(temperature > 0, kept - 1 + beyond, 0).clamp(max=logits.shape[1] - 1)
    return order.gather(1, last[:, None])[:, 0]  # the least likely of what may be drawn


@pytest.mark.parametrize("beyond", [0, 30])
def test_equal_logits_at_the_edge_may_all_be_kept(beyond):
    case = parse_id("sampler/special/dtype=fp16,data=ties,seed=45,cut=both")[2]
    call = STAGE.build(case, "cpu")
    tokens = draw(call.args["logits"], **call.keywords, beyond=beyond)
    assert bool(allowed(call).gather(1, tokens[:, None]).all()) is (beyond == 0)
