"""Dispatch and combine of every scheme over the GPUs of one host, beside the bytes that the scheme has to move.

    python3 suites/performance/dispatch.py [--ranks 4] [--json FILE]

One process per GPU.  Times are medians over single iterations, from CUDA events, of the slowest rank.  Outside graphs
they are mostly the host's: between two runs on machines of one kind they differed by up to 2.3 times for small T.  The
link is measured in the same run; floor = max over ranks of bytes sent or received, of dispatch and of combine, over its
bandwidth.  Graphs hold dispatch, experts and combine, and are replayed with other tokens and other routing than they
were captured with; results are compared with all_to_all_dedup outside graphs.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.impls.dispatchers import dispatcher as schemes
from moe_harness.impls.dispatchers.common import Dispatcher
from moe_harness.impls.parallel.replayed import capture

H, E, K, INTERMEDIATE = 2048, 128, 8, 768  # Qwen3-30B-A3B
TOKENS = (1, 64, 1024, 8192)
SMALL = 64  # without a bound the symmetric path is for up to this many
REPEATED = 10  # dispatch and combine in one graph, so that what is timed is the GPU and not the start of a graph
Batch = tuple[Tensor, Tensor, Tensor]


def batch(tokens: int, seed: int) -> Batch:
    """Hidden states, weights that sum to 1 and distinct uniform ids, on the current GPU."""
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=random, device="cuda").bfloat16()
    scores = torch.rand(tokens, E, generator=random, device="cuda")
    weights, ids = scores.softmax(-1).topk(K)
    return hidden, (weights / weights.sum(-1, keepdim=True)).bfloat16(), ids


def make(scheme: str, tokens: int) -> Dispatcher:
    """The dispatcher over all ranks, experts in equal blocks; bounds where a scheme takes one.

    `+equal` is the least that NCCL needs: every rank knows that all have as many tokens as it has.
    """
    ranks = dist.get_world_size()
    name, _, extra = scheme.partition("+")
    options: dict[str, Any] = {"bound": {"max_tokens": tokens}, "equal": {"equal_tokens": True}}.get(extra, {})
    if name == "local_allreduce":
        options["verify"] = False  # the check of the ranks' tokens is for debugging and reads its result on the host
    return getattr(schemes, name)(dist.group.WORLD, num_experts=E, owner=torch.arange(E) * ranks // E, **options)


def median_us(call: Callable[[], Any], iterations: int, warmup: int = 5) -> float:
    """Median of one call's time between CUDA events; the slowest rank's."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(iterations)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    own = statistics.median(start.elapsed_time(end) * 1000 for start, end in events)
    slowest = torch.tensor([own], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def link_bandwidth() -> dict[str, float]:
    """GB/s that one rank sends to others, in a large all_to_all and in a ring of sends."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sent, received = (torch.empty(ranks << 28, dtype=torch.uint8, device="cuda") for _ in range(2))
    exchange = median_us(lambda: dist.all_to_all_single(received, sent), 10, 3)

    def ring() -> None:
        to, source = (rank + 1) % ranks, (rank - 1) % ranks
        work = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)])
        for request in work:
            request.wait()

    around = median_us(ring, 10, 3)
    return {
        "all_to_all": len(sent) * (ranks - 1) / ranks / exchange / 1e3,
        "ring": len(sent) / around / 1e3,
    }


def bytes_needed(scheme: str, tokens: int, ids: Tensor, weights: Tensor) -> float:
    """Max over ranks of max(sent, received), dispatch plus combine; ids of this rank."""
    ranks = dist.get_world_size()
    name = scheme.partition("+")[0]
    row, slot = H * 2, weights.element_size() + ids.element_size()
    total = tokens * ranks
    if name == "local_allreduce":
        return 2 * (ranks - 1) / ranks * total * row
    if name in ("naive", "allgather_reducescatter", "symmetric"):
        back = 2 * (ranks - 1) / ranks * total if name == "naive" else (ranks - 1) * tokens
        return (ranks - 1) * tokens * (row + K * slot) + back * row
    to = ids * ranks // E
    if name == "all_to_all_dedup":
        counts, extra = (to[:, :, None] == torch.arange(ranks, device="cuda")).any(1).sum(0), K * slot
    else:  # per copy; the masked form needs no more, though it sends its bound
        counts, extra = torch.bincount(to.flatten(), minlength=ranks), slot
    matrix = torch.empty(ranks, ranks, dtype=torch.int64, device="cuda")
    dist.all_gather_into_tensor(matrix, counts)
    off = matrix.cpu().masked_fill(torch.eye(ranks, dtype=torch.bool), 0)
    most = int(torch.maximum(off.sum(0), off.sum(1)).max())
    return most * (2 * row + extra)


def measure(scheme: str, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Time of dispatch, and of dispatch and combine together."""
    replicated = scheme == "local_allreduce"
    held = tokens * dist.get_world_size() if replicated else tokens  # the same number of tokens in all
    rows = batch(held, 1 if replicated else 1 + dist.get_rank())
    mover = make(scheme, held)
    iterations = 100 if tokens <= 64 else 20 if tokens <= 1024 else 8
    d = mover.dispatch(*rows)
    output = torch.randn_like(d.hidden_states)
    both = median_us(lambda: mover.combine(output, mover.dispatch(*rows)), iterations)
    out = median_us(lambda: mover.dispatch(*rows), iterations)
    needed = bytes_needed(scheme, tokens, rows[2][:tokens], rows[1])
    floor = needed / bandwidth / 1e3
    return {"scheme": scheme, "tokens_per_rank": tokens, "dispatch_us": out, "dispatch_combine_us": both,
            "bytes": needed, "floor_us": floor, "over_floor": both / floor if floor else None}  # fmt: skip


def weights_of(rank: int, local: int) -> tuple[Tensor, Tensor]:
    """Experts of this rank, scaled so that results are about 1."""
    random = torch.Generator("cuda").manual_seed(1000 + rank)
    up = torch.randn(local, 2 * INTERMEDIATE, H, generator=random, device="cuda").bfloat16() * H**-0.5
    down = torch.randn(local, H, INTERMEDIATE, generator=random, device="cuda").bfloat16() * INTERMEDIATE**-0.5
    return up, down


def graphed(scheme: str, tokens: int, seeds: tuple[int, ...] = (11, 12, 13)) -> dict[str, Any]:
    """Capture dispatch + experts + combine, replay with changed tokens and routing, compare, time."""
    from moe_harness.impls.triton.experts import experts

    ranks, rank = dist.get_world_size(), dist.get_rank()
    replicated = scheme == "local_allreduce"
    held = tokens * ranks if replicated else tokens
    up, down = weights_of(rank, E // ranks)
    mover, judge = make(scheme, held), make("all_to_all_dedup", held)

    def layer(through: Dispatcher, rows: Batch) -> Tensor:
        d = through.dispatch(*rows)
        return through.combine(experts(d.hidden_states, up, down, d.topk_weights, d.topk_ids), d)

    def of_seed(seed: int) -> Batch:
        return batch(held, seed * 100 + (0 if replicated else rank))

    static = of_seed(10)
    eager = median_us(lambda: layer(mover, static), 30)
    graph, result = capture(lambda: layer(mover, static))
    worst = 0.0
    for seed in seeds:
        rows = of_seed(seed)
        expected = layer(judge, rows).float()
        for target, value in zip(static, rows, strict=True):
            target.copy_(value)
        graph.replay()
        worst = max(worst, float((result.float() - expected).abs().max() / expected.abs().max()))
    errors = torch.tensor([worst], device="cuda")
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    replay = median_us(graph.replay, 50)
    output = torch.randn_like(mover.dispatch(*static).hidden_states)
    alone, _ = capture(lambda: [mover.combine(output, mover.dispatch(*static)) for _ in range(REPEATED)])
    moved = median_us(alone.replay, 50) / REPEATED
    return {"scheme": scheme, "tokens_per_rank": tokens, "eager_us": eager, "replay_us": replay,
            "dispatch_combine_us": moved,
            "worst_relative_error": float(errors), "replays_compared": len(seeds)}  # fmt: skip


PLAN = (
    "naive", "local_allreduce", "allgather_reducescatter", "allgather_reducescatter+equal", "all_to_all",
    "all_to_all_dedup", "masked+bound", "symmetric", "symmetric+bound",
)  # fmt: skip
GRAPHED = ("local_allreduce", "allgather_reducescatter+equal", "masked+bound", "symmetric+bound")


def join(rank: int, ranks: int, store: str) -> None:
    """This process as one rank on the GPU of its number."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )


def header(command: str, ranks: int) -> dict[str, Any]:
    """What was measured on."""
    return {
        "command": f"python3 {command} --ranks {ranks}",
        "device": f"{ranks} x {torch.cuda.get_device_name()}",
        "versions": {"torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
        "shape": {"H": H, "E": E, "k": K, "dtype": "bf16"},
    }


def run_rank(rank: int, ranks: int, store: str, path: str) -> None:
    """Everything one rank measures; rank 0 prints and writes after each figure."""
    join(rank, ranks, store)
    link = link_bandwidth()
    torch.cuda.empty_cache()
    bandwidth = max(link.values())
    found = {**header("suites/performance/dispatch.py", ranks), "link_GB_per_s": link}
    found |= {"table": [], "graphs": [], "failures": []}

    def tell(kind: str, entry: dict[str, Any]) -> None:
        found[kind].append(entry)
        if rank == 0:
            print(kind, {name: round(v, 4) if isinstance(v, float) else v for name, v in entry.items()}, flush=True)
            Path(path).write_text(json.dumps(found, indent=1) + "\n")

    if rank == 0:
        print("link", link, flush=True)
    for tokens in TOKENS:
        for scheme in PLAN:
            if scheme == "symmetric" and tokens > SMALL:
                continue
            _guarded(tell, "table", scheme, tokens, lambda s=scheme, t=tokens: measure(s, t, bandwidth))
            torch.cuda.empty_cache()
    for tokens in (1, SMALL, 1024):
        for scheme in GRAPHED:
            _guarded(tell, "graphs", scheme, tokens, lambda s=scheme, t=tokens: graphed(s, t))
    if rank == 0:
        print_table(found)
    torch.cuda.synchronize()
    dist.barrier()
    os._exit(0)  # captured collectives make an orderly end slow


def _guarded(tell: Callable[..., None], kind: str, scheme: str, tokens: int, call: Callable[[], dict]) -> None:
    """A figure that cannot be taken is told as a failure; where not every rank fails, the timeout ends the run."""
    try:
        tell(kind, call())
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:600]
        tell("failures", {"what": kind, "scheme": scheme, "tokens_per_rank": tokens, "error": message})


def print_table(found: dict[str, Any]) -> None:
    """T per rank down, schemes across: microseconds (times the floor)."""
    print(f"\ndispatch + combine on {found['device']}, us (times the byte floor); link {found['link_GB_per_s']}")
    for scheme in PLAN:
        cells = {e["tokens_per_rank"]: e for e in found["table"] if e["scheme"] == scheme}
        row = [f"{cells[t]['dispatch_combine_us']:.0f} ({cells[t]['over_floor']:.1f})" if t in cells else "-"
               for t in TOKENS]  # fmt: skip
        print(f"{scheme:30}", *(f"{cell:>18}" for cell in row))
    print_small(found["table"])
    for entry in found["graphs"]:
        print(f"graph {entry['scheme']:30} T={entry['tokens_per_rank']:<4} {entry['dispatch_combine_us']:.1f} us; with "
              f"experts eager {entry['eager_us']:.0f} us, replayed {entry['replay_us']:.0f} us, worst relative error "
              f"{entry['worst_relative_error']:.1e}")  # fmt: skip


def print_small(table: list[dict[str, Any]]) -> None:
    """How the symmetric path compares with NCCL for few tokens, each with what the ranks know beforehand."""
    time = {(e["scheme"], e["tokens_per_rank"]): e["dispatch_combine_us"] for e in table}
    pairs = (("symmetric+bound", "allgather_reducescatter+equal"), ("symmetric", "allgather_reducescatter"))
    for tokens in (1, SMALL):
        for own, nccl in pairs:
            if (own, tokens) in time and (nccl, tokens) in time:
                ratio = time[nccl, tokens] / time[own, tokens]
                print(f"T={tokens}: {own} is {ratio:.2f} times as fast as {nccl} outside graphs")


def main(run: Callable[..., None], path: str) -> None:
    """Start `run` as one process per GPU; both scripts have the same command line."""
    parser = argparse.ArgumentParser(description="Times over the GPUs of this host.")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--json", default=path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (given.ranks, f"{folder}/store", given.json), nprocs=given.ranks)


if __name__ == "__main__":
    main(run_rank, "dispatch.json")
