"""Which tokens go to which experts: ids, masks, weights and the map of one rank, drawn for a case."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Builder
from moe_harness.harness.stages.experts.cases import ExpertsCase


def expert_map(case: ExpertsCase) -> tuple[Tensor | None, Tensor]:
    """(expert_map [E] or None, the global ids of the local experts)."""
    everyone = torch.arange(case.E)
    if case.map == "none":
        return None, everyone
    if case.map.startswith("rank"):
        size = max(1, case.E // int(case.map.removeprefix("rank")))
        local = everyone[size : 2 * size] if 2 * size <= case.E else everyone[:size]
    else:
        local = everyone[::2] if case.map == "alternate" else everyone[case.E // 4 : case.E // 4 + max(1, case.E // 2)]
    found = torch.full((case.E,), -1)
    found[local] = torch.arange(len(local))
    return found, local


def ids(case: ExpertsCase, draw: Builder) -> Tensor:
    """Global ids [T, k] before masking."""
    if case.routing == "one":
        return draw.distinct(1, case.E, case.k).expand(case.T, case.k).clone()
    if case.routing == "crowded":  # more rows of one expert than there are tokens, and its neighbour has rows too
        ids = torch.full((case.T, case.k), case.E // 2)
        ids[:, -1] += 1
        return ids
    if case.routing == "last":
        return torch.arange(case.E - case.k, case.E).expand(case.T, case.k).clone()
    if case.routing == "skewed" and case.T:
        favour = torch.linspace(3, 0, case.E) + draw.uniform(case.T, case.E)
        return favour.topk(case.k, dim=-1).indices
    ids = draw.distinct(case.T, case.E, case.k)
    if case.routing == "duplicates" and case.k > 1:
        ids[::2, -1] = ids[::2, 0]
    return ids


def masked(case: ExpertsCase, ids: Tensor, draw: Builder) -> Tensor:
    if case.masked == "all":
        return torch.full_like(ids, -1)
    if case.masked == "some":
        ids = ids.masked_fill(draw.uniform(*ids.shape) < 0.4, -1)
    if case.masked == "one" and case.T:
        ids[-1, 0] = -1
    if case.masked == "rows":
        ids[1::3] = -1
    return ids


def weights(case: ExpertsCase, draw: Builder) -> Tensor:
    """Distinct positive weights that sum to about one, [T, k]."""
    raw = draw.uniform(case.T, case.k) + 0.2
    return raw / raw.sum(-1, keepdim=True)
