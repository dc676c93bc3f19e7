"""Find the tiles of the quantised experts for a shape: as `tune`, for one format of the weights.

Timed apart, each as a CUDA graph over two sets of weights in turn, are the two products: slot by slot (`few`), and
behind an alignment (`aligned`), where activations that become codes do so before the products (`ahead`; the launch that
makes them counts with the first product), which they also may slot by slot (`few_ahead`).  Of the ways the fastest sum
is kept.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.triton import tune
from moe_harness.impls.triton._quantized_operands import PACKED, Matrix, Routing, Rows, quantise, weave
from moe_harness.impls.triton._quantized_product import quantized_product
from moe_harness.impls.triton._quantized_tile import PAIRED_FROM
from moe_harness.impls.triton.alignment import align
from moe_harness.impls.triton.configs import Shape, Tiling
from moe_harness.impls.triton.quantized_experts import CODES, scale_shape
from moe_harness.impls.triton.quantized_plans import Plan, as_json, file_of, rules

__all__ = ["candidates", "tune_layer", "tune_quantized"]

ALIGNMENT_US = 3.0  # what the alignment costs the two ways that have one
FEW = 64  # slots up to which a product for each of them is worth timing
LARGEST_TILE = 128 * 128


@dataclass(frozen=True)
class Job:
    """One candidate of a product: "gate_up" or "down", in one of the ways."""

    way: str  # few, few_ahead, aligned or ahead
    product: str
    tiling: Tiling


@dataclass(frozen=True)
class Layer:
    """What is tuned: the shape, the format, and whether activations become codes."""

    shape: Shape
    format: str
    quantize: bool


def candidates(layer: Layer, way: str, product: str, rows: float) -> Iterator[Tiling]:
    """Tilings worth timing at `rows` rows per expert; their steps are the format's."""
    if way.startswith("few"):
        if way == "few" or product == "down":
            for n, warps, pieces in ((4, 4, 128), (8, 4, 128), (16, 4, 128), (4, 2, 64), (8, 4, 64), (16, 8, 128)):
                yield Tiling(1, n, pieces, warps=warps)
        if layer.format != "plain":
            for stages in (3, 4, 6):
                yield from _slots(layer, product, stages)
        return
    if way == "ahead":  # the fields of a tile are for where that kernel does not fit
        tile = Tiling(64 if rows > 24 else 16, 128, 128, warps=8, stages=3, waves=1)
        groups = (4, 8, 16) if rows >= 128 else (8,)
        yield from (replace(tile, copier=True, group=group) for group in groups)
    if rows <= 24:
        for m in [16] if rows <= 8 else [16, 32]:
            yield from _tilings(layer, way, product, m, [3, 4, 6], [0])
    elif way != "ahead":
        for m in [32, 64] if rows <= 64 else [64, 128, 256]:
            yield from _tilings(layer, way, product, m, [3, 4], [0, 1])


def _tilings(layer: Layer, way: str, product: str, m: int, depths: list[int], waves: list[int]) -> Iterator[Tiling]:
    """Tiles of m rows that fit: every width, number of warps, depth and grid."""
    most = LARGEST_TILE // (2 if product == "gate_up" else 1)  # two sums of the first product lie in registers
    paired = product == "gate_up" and layer.format in PACKED and m >= PAIRED_FROM
    for n, warps in ((64, 4), (128, 4), (128, 8), *([(64, 8)] if paired else [])):
        if (way == "ahead" and product == "gate_up" and n != 128) or m * n > most:
            continue
        for stages in depths:
            if _fits(layer, way, product, m, n, stages):
                for wave in waves:
                    yield from _limited(Tiling(m, n, 128, warps=warps, stages=stages, waves=wave))


def _limited(tiling: Tiling) -> Iterator[Tiling]:
    """A tiling as the compiler has it, and with fewer registers a thread, where its sums leave room for that."""
    yield tiling
    if tiling.m <= 32:
        yield from (replace(tiling, registers=most) for most in ((96, 128) if tiling.n == 64 else (128, 168)))


def _slots(layer: Layer, product: str, stages: int) -> Iterator[Tiling]:
    """Tiles of one slot."""
    for n, warps in ((64, 4), (128, 8)):
        if _fits(layer, "ahead" if layer.quantize else "few", product, 16, n, stages):
            yield from _limited(Tiling(16, n, 128, warps=warps, stages=stages))


def _fits(layer: Layer, way: str, product: str, m: int, n: int, stages: int) -> bool:
    """Whether the stages of a step of 128 columns fit into shared memory."""
    weight = {"int4_group": 64, "mxfp4": 64, "plain": 256}.get(layer.format, 128)
    row = 128 if way == "ahead" else 256
    return ((2 if product == "gate_up" else 1) * n * weight + m * row) * stages <= tune.SHARED_MEMORY - 16384


def _empty(layer: Layer, rows: int, columns: int) -> Matrix:
    """Codes and scales of all experts, of whatever the memory holds."""
    experts, format = layer.shape.experts, layer.format
    width = columns // 2 if format in PACKED else columns
    codes = torch.empty(experts, rows, width, dtype=CODES[format], device="cuda")
    dtype = {"mxfp4": torch.uint8, "int4_group": torch.bfloat16}.get(format, torch.float32)
    scale = torch.empty(scale_shape(format, experts, rows, columns), dtype=dtype, device="cuda")
    return Matrix(codes, scale, None, format)


def _filled(layer: Layer, rows: int, columns: int) -> Matrix:
    """Random codes under one scale: normals in fp8, otherwise every byte is as likely."""
    matrix = _empty(layer, rows, columns)
    fp8 = matrix.codes.dtype == torch.float8_e4m3fn
    for expert in range(layer.shape.experts):  # in fp32 all of them would take four times the room
        if fp8:
            matrix.codes[expert].copy_(torch.randn(matrix.codes.shape[1:], device="cuda") * 64)
        else:
            matrix.codes[expert].view(torch.uint8).random_(0, 256)
    assert matrix.scale is not None
    matrix.scale.fill_(122 if layer.format == "mxfp4" else columns**-0.5 / (64 if fp8 else 4))
    return matrix


def _weights(layer: Layer, make: Callable[[Layer, int, int], Matrix], sets: int) -> list[tuple[Matrix, Matrix]]:
    shape = layer.shape
    up, down = (2 * shape.width, shape.hidden), (shape.hidden, shape.width)
    return [(make(layer, *up), make(layer, *down)) for _ in range(sets)]


def _calls(layer: Layer, job: Job, tokens: int, weights: list[tuple[Matrix, Matrix]]) -> list[Callable[[], Rows]]:
    """A call of the product for each set of weights, on uniform routing."""
    shape = layer.shape
    torch.manual_seed(0)
    ids = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k, dim=-1).indices
    few = job.way.startswith("few")
    woven = not few and layer.format in PACKED
    ints: tuple[Tensor | None, ...] = (None, None) if few else align(ids, shape.experts)
    routing, total, ahead = Routing(ids, None, *ints), ids.numel(), job.way.endswith("ahead")
    if job.product == "down":
        act = Rows(torch.randn(total, shape.width, dtype=torch.bfloat16, device="cuda"))
        act = quantise(act.values) if ahead and not few else weave(act.values) if woven else act
        return [
            partial(quantized_product, act, down, routing, job.tiling, total, torch.bfloat16, quantize=layer.quantize)
            for _, down in weights
        ]
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")

    def first(up: Matrix) -> Rows:
        rows = quantise(x) if ahead else weave(x) if woven else Rows(x)
        return quantized_product(
            rows,
            up,
            routing,
            job.tiling,
            total,
            torch.bfloat16,
            activation="silu",
            codes=ahead and not few,
            quantize=layer.quantize,
        )

    return [partial(first, up) for up, _ in weights]


def _numbers(rows: Rows) -> Tensor:
    """What a product gave, in fp32."""
    values = rows.values.float()
    if rows.scale is None:
        return values
    return values * rows.scale.repeat_interleave(128, 1)[:, : values.shape[1]]


def _compile(shard: tuple[Layer, list[Job]]) -> None:
    """Run every candidate of a shard once on a token, which leaves it in Triton's cache on disk."""
    layer, jobs = shard
    weights = _weights(layer, _empty, 1)
    for job in jobs:
        try:
            _calls(layer, job, 1, weights)[0]()
        except Exception as error:  # noqa: BLE001 - a candidate that does not compile is skipped again when timed
            print(f"compile {job}: {str(error)[:200]}", flush=True)
    torch.cuda.synchronize()


def _key(tokens: int, job: Job) -> str:
    return json.dumps([tokens, job.way, job.product, asdict(job.tiling)])


def _measure(layer: Layer, tokens: int, jobs: list[Job], weights: list[Any], done: dict, log: Path) -> None:
    """Time `jobs` of one way and product, append each to the log and to `done`."""
    first = None
    for job in jobs:
        key = _key(tokens, job)
        if key in done:
            continue
        try:
            calls = _calls(layer, job, tokens, weights)
            out = _numbers(calls[0]())
            first = out if first is None else first
            error = ((out - first).norm() / first.norm()).item()
            done[key] = statistics.median(tune.time_in_graph(calls)) if error < tune.TOLERANCE else None
        except Exception as error:  # noqa: BLE001 - out of shared memory, or not compiled by this version
            print(f"skipped {tokens} {job}: {str(error)[:120]}", flush=True)
            done[key] = None
        with log.open("a") as file:
            file.write(json.dumps([key, done[key]]) + "\n")


def _jobs(layer: Layer, tokens: int) -> dict[tuple[str, str], list[Job]]:
    """Candidates by way and product at a number of tokens."""
    slots = tokens * layer.shape.top_k
    rows = slots / layer.shape.experts
    few = (["few"] + ["few_ahead"] * layer.quantize) if slots <= FEW else []
    wanted = [*few, "ahead" if layer.quantize else "aligned"]
    return {
        (way, product): [Job(way, product, t) for t in candidates(layer, way, product, rows)]
        for way in wanted for product in ("gate_up", "down")
    }  # fmt: skip


def _best(layer: Layer, tokens: int, jobs: dict[tuple[str, str], list[Job]], done: dict) -> tuple[Plan, float]:
    """The plan of the fastest way, and its microseconds; that of the rules where nothing ran."""
    found: list[tuple[float, Plan]] = []
    for way in dict.fromkeys(way for way, _ in jobs):
        halves = []
        for product in ("gate_up", "down"):
            times = [(done[key], job.tiling) for job in jobs[way, product] if done.get(key := _key(tokens, job))]
            halves.append(min(times, key=lambda t: t[0], default=None))
        if all(halves):
            (up_us, up), (down_us, down) = halves  # type: ignore[misc]
            few = way.startswith("few")
            ahead = way.endswith("ahead") or (not few and layer.format in PACKED)
            found.append((up_us + down_us + (0.0 if few else ALIGNMENT_US), Plan(few, ahead, up, down)))
    if not found:
        return rules(layer.shape, layer.format, tokens * layer.shape.top_k, layer.quantize), 0.0
    us, plan = min(found, key=lambda f: f[0])
    return plan, us


def tune_layer(
    experts: int, hidden_size: int, intermediate_size: int, top_k: int, tokens: list[int], log: Path,
    out: Path | None = None, processes: int = 12, *, format: str, function: str = "",
) -> dict[str, Any]:  # fmt: skip
    """As `tune_quantized`: what the command `tune` asks of a library for weights in `format`."""
    shape = Shape(experts, hidden_size, intermediate_size, top_k, element_size=2)
    return tune_quantized(shape, format, function == "fp8_group128", tokens, log, out, processes)


def tune_quantized(
    shape: Shape, format: str, quantize: bool, tokens: list[int], log: Path, out: Path | None = None,
    processes: int = 12,
) -> dict[str, Any]:  # fmt: skip
    """Time all candidates and write the table.

    Args:
        shape: local experts and sizes; activations are bf16.
        format: of the weights; `quantize`: activations become codes, for fp8 alone.
        tokens: numbers of tokens that all meet local experts, one entry each.
        log: JSON lines of the timings, read first and appended to, so a stopped run can be resumed.
        out: file to write, by default the one that `quantized_plans` will find on this device.

    Returns:
        The content of the file.

    Raises:
        ValueError: another format than those with codes, or one that the kernel does not take.
    """
    known = [f for f in CODES if f.startswith("fp8") or not quantize]
    if format not in known:
        raise ValueError(f"format is {format!r}, but should be one of {', '.join(known)}")
    layer = Layer(shape, format, quantize)
    done = dict(json.loads(line) for line in log.read_text().splitlines()) if log.exists() else {}
    jobs = {t: _jobs(layer, t) for t in tokens}
    missing = [job for t in tokens for of in jobs[t].values() for job in of if _key(t, job) not in done]
    print(f"{len(missing)} of {sum(len(of) for t in tokens for of in jobs[t].values())} timings to do", flush=True)
    if missing:
        tune.compile_all(layer, missing, processes, _compile)
    weights = _weights(layer, _filled, 2) if missing else []
    entries = {}
    for t in tokens:
        for of in jobs[t].values():
            _measure(layer, t, of, weights, done, log)
        plan, us = _best(layer, t, jobs[t], done)
        print(f"{t:6} {us:8.1f} us {plan}", flush=True)
        entries[str(t)] = as_json(plan)
    capability = list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    content = {
        "shape": asdict(shape), "format": format, "quantize": quantize, "capability": capability,
        "torch": torch.__version__, "entries": entries,
    }  # fmt: skip
    path = out or file_of(torch.device("cuda"), shape, format, quantize)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}", flush=True)
    return content
