"""One sparse block under expert parallelism: our kernels beside transformers' own, over the GPUs of one host.

    python3 suites/performance/expert_parallel.py [--ranks 4] [--json FILE]

Router, experts and the ranks' exchange of a block of Qwen3-30B-A3B in bf16; all blocks hold the same weights.

    replicated    every rank holds the same R * T tokens, as transformers' EP requires; both sides end in an all_reduce
    distinct      every rank holds T tokens of its own, which a dispatcher moves: the same R * T tokens in all; what
                  transformers' block takes for them is its time on replicated tokens

Times are of the slowest rank, medians from CUDA events: `eager` as called, mostly the host's time for few tokens,
`replayed` as called through `impls.parallel.replayed`, and `graph` the replay of the CUDA graph alone.  `error` is the
largest difference from transformers:grouped_mm over the largest element, on the same choice of experts: bf16 logits
have ties, which two routers may break differently.  A block that is not right is not timed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.impls.parallel.replayed import Replayed
from moe_harness.impls.transformers.expert_parallel import ExpertParallel
from moe_harness.impls.triton.experts import experts
from moe_harness.impls.triton.router import router
from moe_harness.suites.performance.dispatch import INTERMEDIATE, TOKENS, E, H, K, header, join, main, make, median_us

Choice = tuple[Tensor, Tensor]  # topk_weights, topk_ids
Block = Callable[..., Tensor]  # of hidden states and, for the check alone, the choice of experts
FEW = 64  # tokens per rank up to which batched_mm fits: it copies every slot's weights
WRONG = 0.05  # of the largest element; bf16 blocks that are right differ by under 0.02
THEIRS = ("transformers:grouped_mm", "transformers:batched_mm")
OURS = {
    "replicated": ("local_allreduce",),
    "distinct": ("symmetric+bound", "allgather_reducescatter+equal", "all_to_all_dedup"),
}


def weights_of() -> dict[str, Tensor]:
    """The whole block's, the same on every rank, scaled so that results are about 1."""
    random = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda").mul_(shape[-1] ** -0.5).bfloat16()

    return {
        "gate.weight": normal(E, H) * 4,
        "experts.gate_up_proj": normal(E, 2 * INTERMEDIATE, H),
        "experts.down_proj": normal(E, H, INTERMEDIATE),
    }


def ours(scheme: str, weights: dict[str, Tensor], tokens: int) -> Block:
    """Triton router and experts around the dispatcher `scheme`."""
    mover, local = make(scheme, tokens), E // dist.get_world_size()
    mine = slice(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    up, down = weights["experts.gate_up_proj"][mine].clone(), weights["experts.down_proj"][mine].clone()

    def block(x: Tensor, chosen: Choice | None = None) -> Tensor:
        w, ids = chosen or router(F.linear(x, weights["gate.weight"]), top_k=K)
        d = mover.dispatch(x, w, ids)
        return mover.combine(experts(d.hidden_states, up, down, d.topk_weights, d.topk_ids), d)

    return block


def transformers_block(name: str, weights: dict[str, Tensor]) -> Block:
    """transformers' block; it chooses by itself, as `choice` does."""
    implementation = name.partition(":")[2]
    block = ExpertParallel(dist.group.WORLD, dict(weights), top_k=K, experts_implementation=implementation)
    return lambda x, chosen=None: block(x)


def choice(x: Tensor, weights: dict[str, Tensor]) -> Choice:
    """The experts as transformers' router chooses them."""
    scores, ids = F.linear(x, weights["gate.weight"]).softmax(-1, dtype=torch.float32).topk(K)
    return (scores / scores.sum(-1, keepdim=True)).to(x.dtype), ids


def measure(block: Block, x: Tensor, chosen: Choice, expected: Tensor, graph: bool) -> dict[str, Any]:
    """Error, time as called, and times with a graph or why there is none."""
    error = (block(x, chosen).float() - expected).abs().max() / expected.abs().max()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    if not float(error) < WRONG:
        raise RuntimeError(f"the result is wrong by {float(error):.3g} of the largest element")
    iterations = 30 if len(x) <= 8192 else 10
    entry: dict[str, Any] = {"error": float(error), "eager_us": median_us(lambda: block(x), iterations, warmup=10)}
    if graph:
        try:
            replayed, iterations = Replayed(block), 50 if len(x) <= 8192 else 10
            entry["replayed_us"] = median_us(lambda: replayed(x), iterations)
            entry["graph_us"] = median_us(next(iter(replayed.captured.values()))[0].replay, iterations)
        except Exception as reason:
            entry["no_graph"] = f"{type(reason).__name__}: {reason}"[:300]
    return entry


def run_rank(rank: int, ranks: int, store: str, path: str) -> None:
    """Everything one rank measures; rank 0 prints and writes after each figure."""
    join(rank, ranks, store)
    found = {**header("suites/performance/expert_parallel.py", ranks), "table": [], "failures": []}
    weights = weights_of()
    theirs = {name: transformers_block(name, weights) for name in THEIRS}
    for tokens in TOKENS:
        random = torch.Generator("cuda").manual_seed(tokens)
        whole = torch.randn(tokens * ranks, H, generator=random, device="cuda").bfloat16()
        expected, chosen = theirs[THEIRS[0]](whole).float(), choice(whole, weights)
        blocks = [("replicated", name, theirs[name]) for name in THEIRS if name == THEIRS[0] or tokens <= FEW]
        for layout, schemes in OURS.items():
            held = tokens * (ranks if layout == "replicated" else 1)
            blocks += [(layout, scheme, ours(scheme, weights, held)) for scheme in schemes]
        for layout, name, block in blocks:
            own = slice(None) if layout == "replicated" else slice(rank * tokens, (rank + 1) * tokens)
            entry: dict[str, Any] = {"layout": layout, "block": name, "tokens_per_rank": tokens}
            mine = whole[own].clone(), tuple(part[own].clone() for part in chosen), expected[own]
            try:
                # all_to_all reads counts on the host in every call
                entry |= measure(block, *mine, graph=name != "all_to_all_dedup")
                found["table"].append(entry)
            except Exception as error:
                found["failures"].append({**entry, "error": f"{type(error).__name__}: {error}"[:600]})
            if rank == 0:
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}, flush=True)
                Path(path).write_text(json.dumps(found, indent=1) + "\n")
            torch.cuda.empty_cache()
    if rank == 0:
        print_ratios(found["table"])
        print(*found["failures"], sep="\n", flush=True)
    torch.cuda.synchronize()
    dist.barrier()
    os._exit(0)  # captured collectives make an orderly end slow


def print_ratios(table: list[dict[str, Any]]) -> None:
    """transformers' best time over our best, for each layout and number of tokens."""
    for tokens in TOKENS:
        for kind in ("eager_us", "replayed_us", "graph_us"):
            times = {(e["layout"], e["block"]): e[kind] for e in table if e["tokens_per_rank"] == tokens and kind in e}
            best = min((t for (_, name), t in times.items() if name in THEIRS), default=float("nan"))
            for layout, schemes in OURS.items():
                own = {name: times[layout, name] for name in schemes if (layout, name) in times}
                if own:
                    name = min(own, key=own.__getitem__)
                    told = f"T={tokens:<5} {kind:11} {layout:11} {name:30} {own[name]:9.1f} us"
                    print(f"{told}, transformers {best:9.1f} us: {best / own[name]:.2f} times", flush=True)


if __name__ == "__main__":
    main(run_rank, "expert_parallel.json")
