"""The sum over ranks in symmetric memory beside NCCL, on the GPUs of one host: first its bits, then its time.

    python suites/performance/sum_norm.py [--ranks 2] [--json FILE]

Each rank's part is [T, 2048] bf16.  `symmetric` is sum, residual and norm in one launch; `nccl` is all_reduce and the
norm kernel with the residual.  Times are medians of the slowest rank over single calls, from CUDA events, called one by
one and as part of a graph of GRAPHED calls.  What is wanted for [64, 2048]: under 8 us in a graph, and half of NCCL's
time outside.  It ends with 1 where a bit is wrong, on any rank, called or replayed with other values.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.harness.core.call import Call
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.rms_norm.stage import STAGE
from moe_harness.impls.parallel.symmetric import SumNorm
from moe_harness.impls.triton._combine import combine
from moe_harness.impls.triton.rms_norm import rms_norm

H, EPS, DTYPE = 2048, 1e-6, torch.bfloat16
ROWS = (1, 8, 64, 128, 256)
GRAPHED, ITERATIONS, WARM_UP = 20, 200, 20
WANTED_US, WANTED_TIMES = 8.0, 2.0
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # part, weight, residual -> out, total


def drawn(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' parts [R, T, H], weight and residual, the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((dist.get_world_size(), rows, H), (H,), (rows, H))
    parts, weight, residual = (torch.randn(*shape, generator=random).to("cuda", DTYPE) for shape in shapes)
    return parts, weight, residual


def expected(parts: Tensor, residual: Tensor) -> Tensor:
    total = torch.zeros_like(residual, dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return (total + residual.float()).to(DTYPE)


def wrong(symmetric: Step, rows: int) -> list[str]:
    """What differs from the sum in the order of the ranks and its norm, called 50 times and replayed 50 times."""
    told = []
    parts, weight, residual = drawn(rows, 0)
    given = (parts[dist.get_rank()].clone(), weight.clone(), residual.clone())
    graph, captured = capture(symmetric, given, 1)
    for seed in range(1, 51):
        parts, weight, residual = drawn(rows, seed)
        for old, new in zip(given, (parts[dist.get_rank()], weight, residual), strict=True):
            old.copy_(new)
        called = symmetric(*given)
        graph.replay()
        total = expected(parts, residual)
        norm = Call(RmsNormCase(dtype="bf16"), {"x": total, "weight": weight}, {"eps": EPS, "residual": None})
        for how, result in (("called", called), ("replayed", captured[0])):
            if not torch.equal(result[1], total):
                told.append(f"{how}, seed {seed}: {int((result[1] != total).sum())} of {total.numel()} sums differ")
            told += [f"{how}, seed {seed}: {found.message}" for found in STAGE.judge(norm, result[0], ()).findings]
    return told


def half_done(through: SumNorm, rows: int) -> list[str]:
    """Where a part left half done by the kernel before gives other bits than the finished part."""
    told = []
    _, weight, residual = drawn(rows, 0)
    options: dict[str, Any] = {"eps": EPS, "residual": residual}
    random = torch.Generator("cuda").manual_seed(dist.get_rank())
    experts, slots = 64, 8
    y = torch.randn(rows * slots, H, device="cuda", generator=random).to(DTYPE)
    weights = torch.rand(rows, slots, device="cuda", generator=random)
    ids = torch.randint(-1, 2 * experts, (rows, slots), device="cuda", generator=random)
    local = (torch.arange(2 * experts, device="cuda") - experts * (dist.get_rank() % 2)).clamp(min=-1)
    local[local >= experts] = -1
    pieces = torch.randn(4, rows, H, device="cuda", generator=random)
    whole = pieces[0] + pieces[1] + pieces[2] + pieces[3]
    for name, part, found in (
        ("slots", combine(y, weights, ids, experts, local),
         through.of_slots(y, weights, ids, weight, num_experts=experts, local=local, **options)),
        ("pieces", whole.to(DTYPE), through.of_pieces(pieces, weight, **options)),
        ("one piece", pieces[0].to(DTYPE), through.of_pieces(pieces[:1], weight, **options)),
    ):  # fmt: skip
        wanted = through(part, weight, **options)
        for what, got, right in zip(("norm", "sum"), found, wanted, strict=True):
            if not torch.equal(got, right):
                told.append(f"{name}, {what}: {int((got != right).sum())} of {got.numel()} differ")
    return told


def capture(step: Step, given: tuple[Tensor, ...], times: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of so many calls, and their results."""
    step(*given)  # maps memory, compiles
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own threads look at events meanwhile, which only a capture of this thread alone allows.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [step(*given) for _ in range(times)]
    torch.cuda.synchronize()
    return graph, results


def slowest_us(call: Callable[[], Any]) -> float:
    """Median over single calls of the slowest rank, microseconds."""
    times = []
    for i in range(WARM_UP + ITERATIONS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end) * 1e3] if i >= WARM_UP else []
    all_times: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_times, times)
    return statistics.median(map(max, zip(*all_times, strict=True)))


def measured(symmetric: Step, nccl: Step, rows: int) -> dict[str, Any]:
    parts, weight, residual = drawn(rows, 7)
    given = (parts[dist.get_rank()], weight, residual)
    found: dict[str, Any] = {"rows": rows}
    for name, step in (("symmetric", symmetric), ("nccl", nccl)):
        graph, _ = capture(step, given, GRAPHED)
        found[f"{name}_graph_us"] = round(slowest_us(graph.replay) / GRAPHED, 2)
        found[f"{name}_us"] = round(slowest_us(lambda step=step: step(*given)), 2)
    return found


def variant(told: str, group: Any) -> SumNorm:
    """The sum with another number of programs and another size up to which parts are put in words."""
    programs, in_words = map(int, told.split(":"))
    through = SumNorm(group, torch.device("cuda", torch.cuda.current_device()), in_words=in_words)
    kernels = through.kernels
    through.kernels = SimpleNamespace(
        PROGRAMS=programs, sum_norm=kernels.sum_norm, sum_norm_in_words=kernels.sum_norm_in_words
    )
    return through


def nccl(part: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = part.clone()
    dist.all_reduce(total)
    return rms_norm(total, weight, eps=EPS, residual=residual)


def run_variant(through: SumNorm) -> dict[str, Any]:
    """What is wrong on any rank, and, where nothing is, the times."""

    def symmetric(part: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return through(part, weight, eps=EPS, residual=residual)

    rank = dist.get_rank()
    faults = [f"rank {rank}, {rows} rows, {line}" for rows in ROWS for line in wrong(symmetric, rows)]
    faults += [f"rank {rank}, {rows} rows, {line}" for rows in ROWS for line in half_done(through, rows)]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, faults)
    table = [measured(symmetric, nccl, rows) for rows in ROWS] if not any(every) else []
    return {"wrong": sum(every, []), "times": table}


def run_rank(rank: int, ranks: int, store: str, told: str, variants: list[str]) -> None:
    torch.cuda.set_device(rank)
    place = dist.FileStore(store, ranks)
    dist.init_process_group("nccl", store=place, rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    group: Any = dist.group.WORLD
    versions = {"torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "ranks": ranks, "versions": versions}
    found |= run_variant(SumNorm(group, torch.device("cuda", rank)))
    for name in variants:
        if rank == 0:
            Path(told).write_text(json.dumps(found, indent=1))
        found.setdefault("variants", {})[name] = run_variant(variant(name, group))
    if rank == 0:
        Path(told).write_text(json.dumps(found, indent=1))
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)  # captured collectives make an orderly end slow


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variants", nargs="*", default=[], help="PROGRAMS:BYTES in words, to compare with")
    chosen = parser.parse_args()
    if torch.cuda.device_count() < chosen.ranks:
        parser.error(f"--ranks is {chosen.ranks}, but there are {torch.cuda.device_count()} GPUs")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        given = (chosen.ranks, f"{folder}/store", str(told), chosen.variants)
        mp.spawn(run_rank, given, nprocs=chosen.ranks)
        found = {"command": " ".join(sys.argv), **json.loads(told.read_text())}
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    print("\n".join(found["wrong"][:20]) or "every bit is right on every rank, called and replayed")
    for name, run in {"as it is": found, **found.get("variants", {})}.items():
        print(name, *run["wrong"][:3])
        for row in run["times"]:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    at_64 = next((row for row in found["times"] if row["rows"] == 64), None)
    if at_64:
        times = at_64["nccl_us"] / at_64["symmetric_us"]
        print(f"[64, {H}]: {at_64['symmetric_graph_us']} us in a graph (wanted under {WANTED_US}), "
              f"{times:.2f} times NCCL outside (wanted {WANTED_TIMES})")  # fmt: skip
    raise SystemExit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
