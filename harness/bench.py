"""Time implementations of a stage against each other and against the floor that the machine sets.

    floor = max(bytes / copy bandwidth, operations / matrix rate)

Bytes count every input once (of the experts' weights those that the batch touches) and every output once; operations
are two per multiplication.  Both ceilings are measured in the same run, the matrix rate in the same way as the
implementations are timed, many products in a row, which is lower than that of a single product on a cool chip.

Every implementation is first called on the very data it is timed on, and its result compared with the reference's on a
sample of tokens within the bound of its declared roundings; one that fails is not timed.  Then all are timed in turn,
round after round, so that a drift of the clock meets all of them.  Where an implementation can be captured, what is
timed is a CUDA graph that runs it over two sets of weights alternately, so that small batches do not find weights in
the cache.
"""

import contextlib
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from harness import rounding
from harness.contracts import REJECTIONS, Subject, load

SETS = 2  # sets of weights that calls rotate over
SAMPLE = 16  # tokens of each batch that are compared with the reference before timing
TARGET_US = 2000.0  # a graph holds calls worth about this much
MAX_CALLS = 64


@dataclass(frozen=True)
class Shape:
    """What is timed: a model's layer, or one rank's part of it where `local_experts` is fewer."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    local_experts: int | None = None

    @classmethod
    def of(cls, model: Any, *, name: str | None = None, local_experts: int | None = None) -> "Shape":
        """From a model's shape (`fixtures.configs.shape`)."""
        sizes = (model.num_experts, model.hidden_size, model.intermediate_size, model.top_k)
        return cls(name or model.name, *sizes, local_experts)


@dataclass
class Load:
    """One batch: a call per set of weights, and what it must cost at least."""

    calls: list[tuple[dict[str, Any], dict[str, Any]]]
    bytes: float
    flops: float
    sample: Tensor | None = None  # rows that are compared


@dataclass
class Timing:
    """Microseconds per call of one implementation at one number of tokens; `refused` says why there are none."""

    spec: str
    tokens: int
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0
    bound_by: str = ""
    captured: bool = False
    refused: str = ""
    tflops: float = 0.0
    intensity: float = 0.0


@dataclass
class Report:
    """Everything a run found."""

    stage: str
    shape: Shape
    dtype: str
    device: str
    copy_bandwidth: float  # bytes per microsecond
    matrix_rate: float  # operations per microsecond
    versions: dict[str, str]
    command: str
    timings: list[Timing] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def _events(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


class Draw:
    """Random tensors on the device from a generator of its own.

    PyTorch's default generator takes part in every graph capture, and one that fails leaves it unusable.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator("cuda").manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device="cuda", dtype=dtype, generator=self.generator).mul_(scale)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, device="cuda", generator=self.generator)


def copy_bandwidth(draw: Draw, rounds: int = 10, size: int = 2**29) -> float:
    """Bytes read and written per microsecond by a copy of `size` numbers of four bytes."""
    source = draw.uniform(size)
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * size / statistics.median(_events(lambda: target.copy_(source)) for _ in range(rounds))


def matrix_rate(
    draw: Draw, dtype: torch.dtype = torch.bfloat16, side: int = 8192, rounds: int = 5, calls: int = 20
) -> float:
    """Operations per microsecond of a large product of random data, many in a row as the implementations run."""
    a, b = (draw.normal(side, side, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(calls):
            a @ b

    products()
    return 2 * side**3 * calls / statistics.median(_events(products) for _ in range(rounds))


def _weights(shape: Shape, dtype: torch.dtype, draw: Draw) -> list[tuple[Tensor, Tensor]]:
    """SETS pairs of experts' weights."""
    local = shape.local_experts or shape.experts
    h, i = shape.hidden, shape.intermediate
    return [
        (draw.normal(local, 2 * i, h, dtype=dtype, scale=h**-0.5), draw.normal(local, h, i, dtype=dtype, scale=i**-0.5))
        for _ in range(SETS)
    ]


def _experts(shape: Shape, tokens: int, dtype: torch.dtype, weights: list, draw: Draw) -> Load:
    """Uniform routing; on one rank of many, ids are global and a map gives the local ones."""
    x = draw.normal(tokens, shape.hidden, dtype=dtype)
    top = draw.uniform(tokens, shape.experts).topk(shape.top_k, dim=-1)
    local = shape.local_experts or shape.experts
    emap = None
    if local < shape.experts:
        emap = torch.full((shape.experts,), -1, device="cuda")
        emap[:local] = torch.arange(local, device="cuda")
    here = top.indices[top.indices < local]
    names = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "topk_ids")
    routing = (top.values.softmax(-1).to(dtype), top.indices)
    calls = [(dict(zip(names, (x, *w, *routing), strict=True)), {"expert_map": emap}) for w in weights]
    one = 3 * shape.hidden * shape.intermediate
    size = len(here.unique()) * one * x.element_size() + 2 * x.numel() * x.element_size()
    return Load(calls, size, 2.0 * here.numel() * one, _rows(tokens))


def _grouped_linear(shape: Shape, tokens: int, dtype: torch.dtype, weights: list, draw: Draw) -> Load:
    """The experts' first product on its own: tokens * top_k sorted rows, [E, 2I, H]."""
    local = shape.local_experts or shape.experts
    ids = (draw.uniform(tokens * shape.top_k) * local).long().clamp(max=local - 1)
    sizes = torch.bincount(ids, minlength=local)
    x = draw.normal(len(ids), shape.hidden, dtype=dtype)
    calls = [({"x": x, "weight": w[0], "group_sizes": sizes}, {}) for w in weights]
    one = 2 * shape.hidden * shape.intermediate
    rows = len(ids) * (shape.hidden + 2 * shape.intermediate)
    size = (int((sizes > 0).sum()) * one + rows) * x.element_size()
    return Load(calls, size, 2.0 * len(ids) * one, _rows(len(ids)))


def _router(shape: Shape, tokens: int, dtype: torch.dtype, weights: list, draw: Draw) -> Load:
    logits = [draw.normal(tokens, shape.experts, dtype=dtype) for _ in range(SETS)]
    calls = [({"router_logits": t}, {"top_k": shape.top_k}) for t in logits]
    return Load(calls, logits[0].numel() * logits[0].element_size() + tokens * shape.top_k * 12.0, 0.0, _rows(tokens))


def _shared_expert_gate(shape: Shape, tokens: int, dtype: torch.dtype, weights: list, draw: Draw) -> Load:
    def call() -> tuple[dict, dict]:
        hidden, shared = (draw.normal(tokens, shape.hidden, dtype=dtype) for _ in range(2))
        gate = draw.normal(1, shape.hidden, dtype=dtype, scale=shape.hidden**-0.5)
        return {"hidden_states": hidden, "gate_weight": gate, "shared_output": shared}, {}

    calls = [call() for _ in range(2 * SETS)]  # four, or 8192 rows of 1024 would stay in the cache
    return Load(calls, 3.0 * tokens * shape.hidden * calls[0][0]["hidden_states"].element_size(), 0.0, _rows(tokens))


LOADS = {
    "experts": _experts,
    "grouped_linear": _grouped_linear,
    "router": _router,
    "shared_expert_gate": _shared_expert_gate,
}


def _rows(count: int) -> Tensor:
    """Up to SAMPLE row numbers spread over a batch."""
    return torch.linspace(0, count - 1, min(SAMPLE, count), device="cuda").round().long().unique()


def _expected(stage: str, args: dict, keywords: dict, rows: Tensor, declared: tuple[str, ...] | None) -> rounding.Bound:
    """The bound of the sampled rows."""
    if stage == "experts":
        x, up, down, weights, ids = args.values()
        part = (x[rows], up, down, weights[rows], ids[rows])
        return rounding.experts(*part, activation="silu", expert_map=keywords["expert_map"], declared=declared)
    if stage == "shared_expert_gate":
        hidden, gate, shared = args.values()
        return rounding.shared_expert_gate(hidden[rows], gate, shared[rows], declared=declared)
    x, weight, sizes = args.values()
    of = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes)[rows]
    part = torch.bincount(of, minlength=len(sizes))
    return rounding.grouped_linear(x[rows], weight, part, bias=None, declared=declared)


def _routing_problem(args: dict, keywords: dict, result: tuple[Tensor, Tensor], rows: Tensor) -> str:
    """Whether the sampled rows chose the best experts (any of equals) and weighted them."""
    scores = args["router_logits"][rows].double().softmax(-1)
    weights, ids = (r[rows] for r in result)
    chosen = scores.gather(-1, ids.long())
    best = scores.topk(keywords["top_k"], dim=-1).values
    slack = (
        rounding.score_error(args["router_logits"][rows].double(), "softmax").amax() + torch.finfo(torch.float32).eps
    )
    if bool((chosen.sort(-1, descending=True).values - best).abs().amax() > 8 * slack):
        return "the ids are not those of the largest scores"
    wanted = chosen / chosen.sum(-1, keepdim=True)
    return "" if bool((weights.double() - wanted).abs().amax() <= 16 * slack) else "the weights are not the scores'"


def problem(subject: Subject, load_: Load) -> str:
    """Why this implementation may not be timed on this batch, or ""."""
    args, keywords = load_.calls[0]
    try:
        result = subject.call(args, keywords)
        torch.cuda.synchronize()
    except REJECTIONS as error:
        return f"refuses: {str(error).splitlines()[0][:120]}"
    except Exception as error:  # noqa: BLE001 - whatever a foreign implementation raises is its own
        return f"raised {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if subject.stage == "router":
        return _routing_problem(args, keywords, result, load_.sample)
    bound = _expected(subject.stage, args, keywords, load_.sample, subject.declared.rounds)
    z = bound.z(result[load_.sample]).abs()
    worst = float(z.nan_to_num(float("inf")).amax())
    limit = rounding.max_limit()
    return "" if worst <= limit else f"is wrong: {worst:.1f} sigma from the reference, the limit is {limit:.1f}"


class _Runner:
    """Runs one implementation over all its calls, from a CUDA graph where it can be captured."""

    def __init__(self, subject: Subject, load_: Load):
        self.calls = [lambda a=a, k=k: subject.call(a, k) for a, k in load_.calls]
        for call in self.calls:
            call()
        torch.cuda.synchronize()
        once = max(1.0, min(_events(self.calls[0]) for _ in range(2)))
        self.repeats = max(1, min(MAX_CALLS, int(TARGET_US / once)) // len(self.calls))
        self.graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._all()
        except Exception:  # noqa: BLE001 - it waits for the device, or does what no graph may hold: timed call by call
            torch.cuda.synchronize()
            return None
        graph.replay()
        return graph

    def _all(self) -> None:
        for _ in range(self.repeats):
            for call in self.calls:
                call()

    def time(self) -> float:
        """Microseconds per call."""
        return _events(self.graph.replay if self.graph else self._all) / (self.repeats * len(self.calls))


def _time_batch(subjects: list[Subject], load_: Load, tokens: int, rounds: int) -> list[Timing]:
    """Check all, then time those that pass in turn."""
    timings = [Timing(s.spec, tokens, refused=problem(s, load_)) for s in subjects]
    runners = [None if t.refused else _Runner(s, load_) for s, t in zip(subjects, timings, strict=True)]
    taken: list[list[float]] = [[] for _ in subjects]
    for turn in range(rounds + 1):
        for times, runner in zip(taken, runners, strict=True):
            if runner is not None:
                us = runner.time()
                if turn:  # the first round warms up
                    times.append(us)
    for timing, runner, times in zip(timings, runners, taken, strict=True):
        if runner is not None:
            timing.median, timing.low, timing.high = statistics.median(times), min(times), max(times)
            timing.captured = runner.graph is not None
    return timings


def _add_floor(timing: Timing, load_: Load, report: Report) -> None:
    by_bytes, by_flops = load_.bytes / report.copy_bandwidth, load_.flops / report.matrix_rate
    timing.floor, timing.bound_by = max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "operations"
    timing.intensity = load_.flops / load_.bytes
    timing.tflops = load_.flops / timing.median / 1e6 if timing.median else 0.0


def _packages() -> dict[str, str]:
    """Versions of what the implementations are likely to stand on, where installed."""
    found = {}
    for name in ("torch", "triton", "transformers", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def bench(
    stage: str,
    specs: list[str],
    shape: Shape,
    tokens: list[int],
    *,
    dtype: str = "bf16",
    rounds: int = 11,
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] = print,
) -> Report:
    """Time `specs` at each number of `tokens`; needs a CUDA device.

    Raises:
        ValueError: a stage that cannot be timed.
        UsageError, CannotJudge: an implementation that cannot be found or imported.
        RuntimeError: no CUDA device.
    """
    if stage not in LOADS:
        raise ValueError(f"stage is {stage!r}, but should be one of {', '.join(LOADS)}")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to time on")
    subjects = [load(stage, spec) for spec in specs]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    draw = Draw(seed)
    progress("measuring the ceilings")
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)} | _packages()
    name = torch.cuda.get_device_name()
    report = Report(stage, shape, dtype, name, copy_bandwidth(draw), matrix_rate(draw, kind), versions, command)
    weights = _weights(shape, kind, draw) if stage in ("experts", "grouped_linear") else []
    with torch.no_grad():
        for count in tokens:
            progress(f"{stage} {shape.name}, {count} tokens")
            batch = LOADS[stage](shape, count, kind, weights, draw)
            for timing in _time_batch(subjects, batch, count, rounds):
                _add_floor(timing, batch, report)
                report.timings.append(timing)
    return report
