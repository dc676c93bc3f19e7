"""How a router computes: whom it takes among equal scores, and how exact the weights are that it returns."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.stages.router.cases import RouterCase

ROWS, EXPERTS, TIED, SLOTS = 16, 32, 8, 3
BITS = {"bf16": 8, "fp16": 11}  # fewest first
SURE = 2.0**-18  # of a weight: an error below is that of fp32, one above of a narrower format


def sentences(trial: Trial, dtype: str) -> list[str]:
    """Sentences on one dtype of the logits; only what the probes establish."""
    return [*_ties(trial, dtype), *_weights(trial, dtype)]


def _ties(trial: Trial, dtype: str) -> list[str]:
    """In every row TIED logits, here and there, are the largest; SLOTS of them are taken."""
    random = torch.Generator().manual_seed(0)
    tied = torch.rand(ROWS, EXPERTS, generator=random).argsort(1)[:, :TIED].sort(1).values
    logits = torch.zeros(ROWS, EXPERTS).scatter_(1, tied, 4.0)
    found = _run(trial, dtype, logits, renormalize=True)
    if found is None:
        return []
    chosen = found[1].sort(1).values
    if torch.equal(chosen, tied[:, :SLOTS]):
        return ["takes the lower ids among equal scores"]
    if torch.equal(chosen, tied[:, -SLOTS:]):
        return ["takes the higher ids among equal scores"]
    return ["takes neither the lowest nor the highest ids among equal scores"]


def _weights(trial: Trial, dtype: str) -> list[str]:
    """Unnormalised probabilities against fp64: the format that they were rounded to, or computed in."""
    random = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(ROWS, EXPERTS, generator=random)).to(DTYPES[dtype])
    found = _run(trial, dtype, logits, renormalize=False)
    if found is None:
        return []
    weights, ids = found
    returned = next(name for name, kind in DTYPES.items() if kind == weights.dtype)
    told = f"returns weights in {returned}"
    narrow = [name for name in BITS if torch.equal(weights.to(DTYPES[name]).to(weights.dtype), weights)]
    if returned in BITS:
        return [told]
    if narrow:
        return [f"{told} that hold no more bits than {narrow[0]}"]
    exact = logits.double().softmax(-1).gather(1, ids)
    error = float(((weights.double() - exact) / exact).square().mean().sqrt())
    return [f"{told}, {'computed in fp32' if error < SURE else f'off by {error:.1g} of their size'}"]


def _run(trial: Trial, dtype: str, logits: Tensor, renormalize: bool) -> tuple[Tensor, Tensor] | None:
    """(weights, ids) on the CPU; None where the implementation refuses or fails."""
    options = {"top_k": SLOTS, "scoring": "softmax", "renormalize": renormalize, "correction_bias": None,
               "num_expert_group": None, "topk_group": None, "routed_scaling_factor": 1.0}  # fmt: skip
    call = Call(RouterCase(T=ROWS, E=EXPERTS, k=SLOTS, dtype=dtype, optional=True), {}, options)
    call.args["router_logits"] = call.arena.place("router_logits", logits.to(trial.device, DTYPES[dtype]))
    try:
        weights, ids = trial.invoke(call)
    except (Rejected, Broken):
        return None
    return weights.cpu(), ids.cpu().long()
