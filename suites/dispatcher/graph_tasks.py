"""What one rank does in the test of CUDA graphs: capture a layer once, replay it with other tokens and other routing.

Without a GPU the same layer is simply called again, so that what the test expects is itself tested everywhere.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.suites.parallel_linear.layout_tasks import parts_of, tokens_of, weights_of

EXPERTS, TOP_K = 8, 2
ROUTINGS = ("even", "one expert", "masked", "own rank only", "none")


def routed(kind: str, tokens: int, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights that are powers of two, and ids [T, k] of one kind."""
    ids = torch.rand(tokens, EXPERTS, generator=random).argsort(1)[:, :TOP_K]
    if kind == "one expert":
        ids[:, 0], ids[:, 1] = EXPERTS - 1, -1
    elif kind == "masked":
        ids[torch.rand(ids.shape, generator=random) < 0.5] = -1
    elif kind == "own rank only":
        ids[:] = rank
        ids[:, 1] = -1
    elif kind == "none":
        ids[:] = -1
    return torch.tensor([0.5, 0.25]).expand(ids.shape).contiguous(), ids


def run(me: Rank, spec: dict[str, Any], seed: int) -> list[str]:
    """Task: the replays whose result is not, bit for bit, that of one rank, in words."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16
    weights = weights_of({"experts": EXPERTS, "dtype": "bf16"}, random)
    owner = torch.arange(EXPERTS) * me.world_size // EXPERTS
    kind = load("dispatcher", spec["impl"])
    dispatcher = kind(me.group, num_experts=EXPERTS, owner=owner, **spec["options"])
    experts = load("experts", spec["experts"])
    mine = (owner == me.rank).nonzero().flatten()
    up, down = (weights[f"experts.{name}"][mine].to(me.device, dtype) for name in ("gate_up_proj", "down_proj"))
    tokens, apart = spec["tokens"], not getattr(kind, "requires_replicated_tokens", False)

    def batch(number: int, routing: str) -> tuple[Tensor, ...]:
        own = torch.Generator().manual_seed(seed * 1000 + number * 10 + (me.rank if apart else 0))
        return tokens_of(tokens, own), *routed(routing, tokens, me.rank if apart else 0, own)

    def layer(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        d = dispatcher.dispatch(x, w, ids)
        return dispatcher.combine(experts(d.hidden_states, up, down, d.topk_weights, d.topk_ids), d)

    if me.backend == "nccl":
        layer = load("moe_block", "moe_harness.impls.parallel.replayed:Replayed")(layer, me.group)
    wrong, results = [], []
    for number, routing in enumerate(ROUTINGS * 2):
        given = batch(number, routing)
        placed = [part.to(me.device, dtype if i == 0 else part.dtype) for i, part in enumerate(given)]
        results.append((number, routing, given, layer(*placed)))
    for number, routing, given, result in results:  # at the end, so that no result may be changed by a later call
        x, w, ids = given
        expected, _ = parts_of(x, weights, lambda _, w=w, ids=ids: (w, ids), EXPERTS)
        if not torch.equal(result.cpu().double(), expected):
            wrong.append(f"rank {me.rank}, replay {number} ({routing}): {result.cpu().tolist()} != {expected.tolist()}")
    return wrong
