"""What one rank does in the test of CUDA graphs: capture a layer once, replay it with other tokens and other routing.

Without a GPU the same layer is simply called again, so that what the test expects is itself tested everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.ranks.loading import load
from harness.ranks.worker import Rank
from suites.parallel_linear.layout_tasks import HIDDEN, parts_of, tokens_of, weights_of

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


def captured(layer: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(replay, the tensor that replays write) of `layer` on the current GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()  # compiles and connects what cannot be done while capturing
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own threads look at events meanwhile, which only a capture of this thread alone allows.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = layer()
    return graph.replay, result


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

    static = [part.to(me.device, dtype if i == 0 else part.dtype) for i, part in enumerate(batch(0, "even"))]

    def layer() -> Tensor:
        d = dispatcher.dispatch(*static)
        return dispatcher.combine(experts(d.hidden_states, up, down, d.topk_weights, d.topk_ids), d)

    replay, result = captured(layer) if me.backend == "nccl" else (None, torch.empty(tokens, HIDDEN))
    wrong = []
    for number, routing in enumerate(ROUTINGS * 2):
        given = batch(number, routing)
        for target, value in zip(static, given, strict=True):
            target.copy_(value)
        if replay is None:
            result = layer()
        else:
            replay()
        x, w, ids = given
        expected, _ = parts_of(x, weights, lambda _, w=w, ids=ids: (w, ids), EXPERTS)
        if not torch.equal(result.cpu().double(), expected):
            wrong.append(f"rank {me.rank}, replay {number} ({routing}): {result.cpu().tolist()} != {expected.tolist()}")
    return wrong
