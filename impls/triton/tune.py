"""Find the tiles for a shape: time every candidate of each product at each number of tokens, keep the fastest.

The two products are timed apart, each as a CUDA graph over two sets of weights in turn, so that small batches do not
find their weights in the L2 cache.  Every candidate's result is compared with the first one's before it is timed.  Each
timing is appended to a log beside the result as soon as it is known; a second run with the same log goes on behind it.
Candidates are compiled by several processes first: compiling takes longer than timing.
"""

import json
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.capturing import capturing
from moe_harness.impls.triton import configs
from moe_harness.impls.triton._few_tokens import few_tokens
from moe_harness.impls.triton._linear import linear
from moe_harness.impls.triton.alignment import align
from moe_harness.impls.triton.configs import Entry, Shape, Tiling, Walk
from moe_harness.impls.triton.gate_up import gate_up

__all__ = ["candidates", "time_in_graph", "tune"]

SHARED_MEMORY = 227 * 1024
SHARD = 8  # candidates that a process compiles at a time
TOLERANCE = 2e-2  # relative norm between two right bf16 results; a wrong tile is off by 1


@dataclass(frozen=True)
class Workload:
    """Random inputs of one (shape, tokens): two sets of weights, one batch."""

    x: Tensor
    up: list[Tensor]
    down: list[Tensor]
    weights: Tensor
    ids: Tensor


def weights_for(shape: Shape, device: str = "cuda") -> tuple[list[Tensor], list[Tensor]]:
    """Two sets of bf16 weights, scaled so that values keep their size through both products."""
    up, down = (shape.experts, 2 * shape.width, shape.hidden), (shape.experts, shape.hidden, shape.width)

    def make(size: tuple[int, int, int]) -> Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device).mul_(size[2] ** -0.5)

    return [make(up), make(up)], [make(down), make(down)]


def workload(shape: Shape, tokens: int, weights: tuple[list[Tensor], list[Tensor]]) -> Workload:
    """Uniform routing without repeats in a row."""
    device = weights[0][0].device
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    scores = torch.rand(tokens, shape.experts, device=device)
    top = scores.topk(shape.top_k, dim=-1)
    return Workload(x, *weights, top.values.softmax(-1).to(x.dtype), top.indices)


def candidates(kind: str, rows: float) -> Iterator[Tiling | Walk]:
    """Tilings worth timing for "gate_up", "down" or the walks for "walk", at `rows` rows per expert."""
    if kind == "walk":
        for n, k, warps, stages in ((32, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (64, 64, 4, 5),
                                    (16, 256, 2, 3), (32, 128, 2, 4), (16, 256, 1, 3), (16, 512, 2, 3)):  # fmt: skip
            yield Walk(n, k, warps, stages)
        for n, k, warps, stages in ((64, 128, 4, 3), (64, 256, 4, 3), (32, 256, 4, 3), (32, 256, 2, 3), (32, 128, 2, 5),
                                    (64, 128, 4, 5), (32, 128, 1, 4), (128, 128, 4, 3), (16, 256, 1, 3)):  # fmt: skip
            yield Walk(down_n=n, down_k=k, down_warps=warps, down_stages=stages)
        return
    parts = 2 if kind == "gate_up" else 1
    for tiling in (*_streaming(rows), *_middle(rows), *_large(rows)):
        tile = Tiling(**{**asdict(tiling), "n": tiling.n * 2 // parts})
        if tile.extra and parts == 1:
            continue
        rows_read = parts * tile.n + tile.m + tile.extra
        if rows_read * tile.k * 2 * tile.stages <= SHARED_MEMORY - 2048 and tile.n <= 256:
            yield tile


def _streaming(rows: float) -> Iterator[Tiling]:
    """Few rows per expert: reading weights is all; n counts half the weight rows of a tile."""
    if rows > 24:
        return
    for m in (16,) if rows < 6 else (16, 32):
        for n, k, stages in ((32, 128, 4), (64, 64, 4), (64, 64, 6), (64, 128, 2), (64, 128, 3), (128, 128, 2)):
            for by_expert in (False, True):
                if n >= 64:
                    yield Tiling(m, n, k, stages=stages, warps=4, swap=True, by_expert=by_expert)
                yield Tiling(m, n, k, stages=stages, warps=4, by_expert=by_expert)
        yield Tiling(m, 64, 128, stages=3, warps=4, swap=True, waves=2)
        yield Tiling(m, 64, 128, stages=3, warps=4, swap=True, tma=False)
        yield Tiling(m, 32, 256, stages=3, warps=4)
        yield Tiling(m, 32, 128, stages=3, warps=4)


def _middle(rows: float) -> Iterator[Tiling]:
    """Tens of rows per expert."""
    if not 12 <= rows <= 160:
        return
    for m in (32, 64) if rows < 48 else (64, 128):
        for n, k, stages in ((64, 64, 3), (64, 64, 4), (64, 128, 2), (128, 64, 3), (128, 64, 4)):
            yield Tiling(m, n, k, stages=stages, warps=4, swap=True)
            if m >= 64:
                yield Tiling(m, n, k, stages=stages, warps=4)
                yield Tiling(m, n, k, stages=stages, warps=8)
            yield Tiling(m, n, k, stages=stages, warps=4, by_expert=True)
        for extra in (16, 32):
            yield Tiling(m, 64, 64, warps=4, stages=3, swap=True, extra=extra)
            yield Tiling(m, 64, 64, warps=4, stages=4, swap=True, extra=extra)
        yield Tiling(m, 64, 64, warps=4, stages=4, waves=2, flat=True)
    yield Tiling(64, 64, 64, warps=4, tail=True)
    yield Tiling(128, 64, 64, warps=4, tail=True)


def _large(rows: float) -> Iterator[Tiling]:
    """Enough rows to be bound by arithmetic."""
    if rows < 60:
        return
    for m, n, k, warps, stages in ((64, 128, 64, 4, 4), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3),
                                   (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)):  # fmt: skip
        yield Tiling(m, n, k, 8, warps, stages)
        if m == 128:
            yield Tiling(m, n, k, 8, warps, stages, tail=True)
            yield Tiling(m, n, k, 8, warps, stages, waves=2 if warps == 4 else 1)
            yield Tiling(m, n, k, 8, warps, stages, waves=2 if warps == 4 else 1, flat=True)
        if warps == 8:
            yield Tiling(m, n, k, 2, warps, stages)
    yield Tiling(128, 64, 64, warps=4, stages=3, swap=True, extra=32)
    yield Tiling(128, 128, 64, 8, 8, 4, extra=64)
    yield Tiling(128, 128, 64, 2, 8, 4, tail=True)
    yield Tiling(128, 128, 64, 16, 8, 4, waves=1)
    for group in (2, 8, 32):
        yield Tiling(128, 128, 64, group, 8, 4, copier=True)


def time_in_graph(calls: Sequence[Callable[[], object]], rounds: int = 7, at_least_us: float = 600.0) -> list[float]:
    """Microseconds per call over `rounds` replays of a graph that runs `calls` in turn, several times each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[0]()
        end.record()
    torch.cuda.synchronize()
    repeats = max(1, min(40, int(at_least_us / len(calls) / max(1.0, 1e3 * start.elapsed_time(end)))))
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / repeats / len(calls))
    return times


def _calls(kind: str, load: Workload, how: Any) -> list[Callable[[], Tensor]]:
    """One call per set of weights."""
    total, top_k, experts = load.ids.numel(), load.ids.shape[1], load.up[0].shape[0]
    if kind == "walk":
        return [partial(few_tokens, load.x, load.up[i], load.down[i], load.ids, "silu", None, how) for i in range(2)]
    counts, slots = align(load.ids, experts)
    if kind == "gate_up":
        return [partial(gate_up, load.x, load.up[i], counts, slots, top_k, "silu", how, total) for i in range(2)]
    act = gate_up(load.x, load.up[0], counts, slots, top_k, "silu", Tiling(16, 32, 64), total)
    return [partial(linear, act, load.down[i], counts, how, total, slots=slots) for i in range(2)]


def _compile(shard: tuple[Shape, list[tuple[str, Tiling | Walk]]]) -> None:
    """Run every candidate of a shard once on a tiny batch, which leaves it in Triton's cache on disk."""
    shape, jobs = shard
    up = torch.empty(shape.experts, 2 * shape.width, shape.hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.empty(shape.experts, shape.hidden, shape.width, dtype=torch.bfloat16, device="cuda")
    load = workload(shape, 1, ([up, up], [down, down]))
    for kind, how in jobs:
        try:
            _calls(kind, load, how)[0]()
        except Exception as error:  # noqa: BLE001 - a candidate that does not compile is skipped again when timed
            print(f"compile {kind} {how}: {str(error)[:200]}", flush=True)
    torch.cuda.synchronize()


def compile_all(what: Any, jobs: list[Any], processes: int, work: Callable[[Any], None] = _compile) -> None:
    """Compile `jobs` of a shape or layer in `processes` fresh processes, which leave Ctrl-C to this one."""
    unique = list(dict.fromkeys(jobs))
    shards = [(what, unique[i : i + SHARD]) for i in range(0, len(unique), SHARD)]
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(processes, signal.signal, ignore) as pool:
        for done, _ in enumerate(pool.imap_unordered(work, shards), 1):
            print(f"compiled {min(done * SHARD, len(unique))} of {len(unique)} candidates", flush=True)


def _key(kind: str, tokens: int, how: Tiling | Walk) -> str:
    return json.dumps([kind, tokens, asdict(how)])


def _measure(kind: str, tokens: int, load: Workload, jobs: list[Tiling | Walk], done: dict, log: Path) -> None:
    """Time `jobs`, append each to the log and to `done`."""
    first = None
    for how in jobs:
        key = _key(kind, tokens, how)
        if key in done:
            continue
        try:
            calls = _calls(kind, load, how)
            out = calls[0]().float()
            first = out if first is None else first
            error = ((out - first).norm() / first.norm()).item()
            done[key] = statistics.median(time_in_graph(calls)) if error < TOLERANCE else None
        except Exception as error:  # noqa: BLE001 - out of shared memory, or not compiled by this version
            print(f"skipped {kind} {tokens} {how}: {str(error)[:120]}", flush=True)
            done[key] = None
        with log.open("a") as file:
            file.write(json.dumps([key, done[key]]) + "\n")


def _best(kind: str, tokens: int, rows: float, done: dict) -> tuple[float, Tiling | Walk] | None:
    """(microseconds, candidate) of the fastest; the two halves of a walk are chosen apart."""
    keys = {_key(kind, tokens, how): how for how in candidates(kind, rows)}
    found: list[tuple[float, Any]] = [(done[key], how) for key, how in keys.items() if done.get(key) is not None]
    found.sort(key=lambda f: f[0])
    if kind != "walk" or not found:
        return found[0] if found else None
    default = Walk()
    up = next((w for _, w in found if w == _with_up(default, w)), default)
    down = next((w for _, w in found if w == _with_up(w, default)), default)
    return found[0][0], _with_up(down, up)


def _with_up(walk: Walk, up: Walk) -> Walk:
    """`walk` with the first half of `up`."""
    return replace(walk, up_n=up.up_n, up_k=up.up_k, up_warps=up.up_warps, up_stages=up.up_stages)


def tune_layer(
    experts: int, hidden_size: int, intermediate_size: int, top_k: int, tokens: list[int], log: Path,
    out: Path | None = None, processes: int = 12,
) -> dict:  # fmt: skip
    """As `tune`, for a layer in bf16: what the command `tune` asks of a library."""
    return tune(Shape(experts, hidden_size, intermediate_size, top_k, element_size=2), tokens, log, out, processes)


def tune(shape: Shape, tokens: list[int], log: Path, out: Path | None = None, processes: int = 12) -> dict:
    """Time all candidates and write the tuned file.

    Args:
        shape: bf16 shape to tune.
        tokens: numbers of tokens, one entry each.
        log: JSON lines of the timings, read first and appended to, so a stopped run can be resumed.
        out: file to write, by default the one that `configs` will find on this device.

    Returns:
        The content of the file.
    """
    done = dict(json.loads(line) for line in log.read_text().splitlines()) if log.exists() else {}
    kinds = {t: ["walk"] * (t <= 8) + ["gate_up", "down"] * (t >= 4) for t in tokens}
    rows = {t: t * shape.top_k / shape.experts for t in tokens}
    jobs = [(k, c, t) for t in tokens for k in kinds[t] for c in candidates(k, rows[t])]
    missing = [(k, c) for k, c, t in jobs if _key(k, t, c) not in done]
    print(f"{len(missing)} of {len(jobs)} timings to do", flush=True)
    if missing:
        compile_all(shape, missing, processes)
    weights = weights_for(shape) if missing else None
    entries = {}
    for t in tokens:
        best = {}
        for kind in kinds[t]:
            if weights is not None:
                print(f"{t:6} {kind:8} timing {len(list(candidates(kind, rows[t])))} candidates", flush=True)
                _measure(kind, t, workload(shape, t, weights), list(candidates(kind, rows[t])), done, log)
            best[kind] = _best(kind, t, rows[t], done)
            print(f"{t:6} {kind:8} {best[kind]}", flush=True)
        entries[str(t)] = configs.entry_to(_entry(best))
    capability = list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    content = {"shape": asdict(shape), "capability": capability, "torch": torch.__version__, "entries": entries}
    path = out or configs.TUNED / f"{configs.device_name(torch.device('cuda'))}.{_name(shape)}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}", flush=True)
    return content


def _name(shape: Shape) -> str:
    return f"E{shape.experts}_H{shape.hidden}_I{shape.width}_k{shape.top_k}_{8 * shape.element_size}bit"


def _entry(best: dict) -> Entry:
    """The walk where it beats the two products with their one more launch (about 4 us), else the products."""
    walk, up, down = (best.get(kind) for kind in ("walk", "gate_up", "down"))
    if walk and (not up or not down or walk[0] < up[0] + down[0] + 4.0):
        return Entry(walk=walk[1])
    if not up or not down:
        raise RuntimeError("no candidate of a product ran; the messages above say why")
    return Entry(gate_up=up[1], down=down[1])
