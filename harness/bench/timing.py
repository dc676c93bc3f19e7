"""Time implementations of a stage against each other and against the floor that the machine sets.

    floor = max(bytes / copy bandwidth, operations / matrix rate, one launch)

The three ceilings are measured in the same run, the matrix rate and the launch in the same way as the implementations
are timed: many in a row, which for the product is slower than one alone on a cool chip.

What is timed is what is judged: after an implementation was captured in a CUDA graph (where it can be), its outputs
are poisoned, the graph is replayed, and a sample of each result's rows compared with the reference within the bound of
the declared roundings.  One that fails is not timed.  Then all are timed in turn, round after round, so that a drift of
the clock meets all of them.
"""

import contextlib
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_harness.harness.bench.data import Draw, TimedBatch, TimedLayer, problem
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.contracts import REJECTIONS, Subject, load
from moe_harness.harness.core.cuda_graphs import captured
from moe_harness.harness.core.memory import poison_value
from moe_harness.harness.core.registry import needed_part, stages_with

TARGET_US = 2000.0  # a graph holds calls worth about this much
MAX_CALLS = 64


@dataclass
class Timing:
    """Microseconds per call of one implementation at one number of tokens; `refused` says why there are none.

    `called`: without a graph, many calls in a row, which the host bounds where it is slower than the device.
    """

    spec: str
    tokens: int
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0
    bound_by: str = ""
    captured: bool = False
    called: float = 0.0
    refused: str = ""
    tflops: float = 0.0
    intensity: float = 0.0
    rounds: list[float] = field(default_factory=list)  # all of them, for who compares runs


@dataclass
class BenchReport:
    """Everything a run found."""

    stage: str
    model: dict[str, Any]
    ep_size: int
    dtype: str
    device: str
    copy_bandwidth: float  # bytes per microsecond
    matrix_rate: float  # operations per microsecond
    launch: float  # microseconds from one launch to the next inside a graph
    versions: dict[str, str]
    command: str
    timings: list[Timing] = field(default_factory=list)
    format: str = ""  # of the weights, where the stage has several
    fp8_rate: float = 0.0  # operations per microsecond of products of fp8, where the floor asks for them
    stopped: str = ""  # why there are fewer timings than were asked for

    @classmethod
    def read(cls, path: Path) -> "BenchReport":
        """From a file that `as_json` gave."""
        content = json.loads(path.read_text())
        return cls(**content | {"timings": [Timing(**t) for t in content["timings"]]})

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def title(self) -> str:
        part = f", one rank of EP {self.ep_size}" if self.ep_size > 1 else ""
        kind = f"{self.format}, {self.dtype}" if self.format else self.dtype
        return f"{self.stage}, {self.model['name']}{part}, {kind}, {self.device}"


def _events(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def copy_bandwidth(draw: Draw, rounds: int = 10, size: int = 2**29) -> float:
    """Bytes read and written per microsecond by a copy of `size` numbers of four bytes."""
    source = draw.uniform(size)
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * size / statistics.median(_events(lambda: target.copy_(source)) for _ in range(rounds))


def matrix_rate(draw: Draw, dtype: torch.dtype, side: int = 8192, rounds: int = 5, calls: int = 20) -> float:
    """Operations per microsecond of a large product of random data, many in a row as the implementations run."""
    a, b = (draw.normal(side, side, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(calls):
            a @ b

    products()
    return 2 * side**3 * calls / statistics.median(_events(products) for _ in range(rounds))


def fp8_rate(draw: Draw, side: int = 8192, rounds: int = 5, calls: int = 20) -> float:
    """The same of a product of e4m3 codes with one scale each, 0 where the device has none."""
    a, b = (draw.normal(side, side, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=draw.device)

    def products() -> None:
        for _ in range(calls):
            torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    try:
        products()
    except (RuntimeError, NotImplementedError):
        return 0.0
    return 2 * side**3 * calls / statistics.median(_events(products) for _ in range(rounds))


def launch_time(draw: Draw, rounds: int = 10, calls: int = 500) -> float:
    """Microseconds from one launch to the next of a kernel that does next to nothing, inside a graph."""
    x = draw.uniform(32)

    def kernels() -> None:
        for _ in range(calls):
            x.neg_()

    graph, _ = captured(kernels)
    graph.replay()
    return statistics.median(_events(graph.replay) for _ in range(rounds)) / calls


class _Runner:
    """Runs one implementation over all calls of a batch, from a CUDA graph where it can be captured."""

    def __init__(self, subject: Subject, batch: TimedBatch):
        self.calls = [lambda a=a, k=k: subject.call(a, k) for a, k in batch.calls]
        self.last: list[Any] = []  # the latest result of each call
        self._once()
        torch.cuda.synchronize()
        once = max(1.0, min(_events(self.calls[0]) for _ in range(2)))
        self.repeats = max(1, min(MAX_CALLS, int(TARGET_US / once)) // len(self.calls))
        self.graph = self._capture()

    def _once(self) -> None:
        self.last = [call() for call in self.calls]

    def _all(self) -> None:
        for _ in range(self.repeats):
            self._once()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        try:
            return captured(self._all)[0]
        except Exception:  # noqa: BLE001 - it waits for the device, or does what no graph may hold: timed call by call
            torch.cuda.synchronize()
            self._once()
            return None

    def results(self) -> list[Any]:
        """A result of each call of what is timed; a graph finds its outputs poisoned."""
        if self.graph is not None:
            for result in self.last:
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    tensor.fill_(poison_value(tensor.dtype))
            self.graph.replay()
        torch.cuda.synchronize()
        return self.last

    def time(self) -> float:
        """Microseconds per call, from the graph where there is one."""
        return _events(self.graph.replay if self.graph else self._all) / (self.repeats * len(self.calls))

    def time_called(self) -> float:
        """Microseconds per call without a graph."""
        return _events(self._all) / (self.repeats * len(self.calls))


def _runner(subject: Subject, batch: TimedBatch) -> tuple[_Runner | None, str]:
    """(runner, "") or (None, why this implementation may not be timed on this batch)."""
    if "cuda" not in subject.declared.devices:
        return None, f"declares the devices {', '.join(subject.declared.devices)}"
    try:
        runner = _Runner(subject, batch)
        told = problem(subject, batch, runner.results())
        return (None, told) if told else (runner, "")
    except REJECTIONS as error:
        return None, f"refuses: {_first_line(error)}"
    except Exception as error:  # noqa: BLE001 - whatever a foreign implementation raises is its own
        return None, f"raised {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["(no message)"])[0][:160]


def _time_batch(subjects: list[Subject], batch: TimedBatch, tokens: int, rounds: int) -> list[Timing]:
    """Judge all, then time those that pass in turn."""
    timings, runners = [], []
    for subject in subjects:
        runner, refused = _runner(subject, batch)
        if runner is None:
            torch.cuda.empty_cache()  # it may have filled the memory
        runners.append(runner)
        timings.append(Timing(subject.spec, tokens, refused=refused))
    taken: list[list[tuple[float, float]]] = [[] for _ in subjects]
    for turn in range(rounds + 1):
        for times, runner in zip(taken, runners, strict=True):
            if runner is not None:
                us = runner.time()
                called = runner.time_called() if runner.graph else us
                if turn:  # the first round warms up
                    times.append((us, called))
    for timing, runner, times in zip(timings, runners, taken, strict=True):
        if runner is not None:
            replayed, in_calls = zip(*times, strict=True)
            timing.median, timing.low, timing.high = statistics.median(replayed), min(replayed), max(replayed)
            timing.rounds = list(replayed)
            timing.captured, timing.called = runner.graph is not None, statistics.median(in_calls)
    return timings


def _add_floor(timing: Timing, batch: TimedBatch, report: BenchReport) -> None:
    floors = {
        "bytes": batch.bytes / report.copy_bandwidth,
        "flops": batch.flops / (report.fp8_rate if batch.fp8 and report.fp8_rate else report.matrix_rate),
        "launch": report.launch,
    }
    timing.bound_by = max(floors, key=lambda name: floors[name])
    timing.floor = floors[timing.bound_by]
    timing.intensity = batch.flops / batch.bytes
    timing.tflops = batch.flops / timing.median / 1e6 if timing.median else 0.0


def _versions() -> dict[str, str]:
    """Versions of what the implementations are likely to stand on, where installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "liger-kernel", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def bench(
    stage: str,
    specs: list[str],
    layer: TimedLayer,
    tokens: list[int],
    *,
    dtype: str = "bf16",
    rounds: int = 11,
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] = print,
) -> BenchReport:
    """Time `specs` at each number of `tokens`; needs a CUDA device.

    Ctrl-C, or an implementation that leaves the device in error, ends the run with what was timed until then.

    Raises:
        ValueError: a stage that cannot be timed.
        UsageError, CannotJudge: an implementation that cannot be found or imported.
        RuntimeError: no CUDA device.
    """
    if stage not in stages_with("bench"):
        raise ValueError(f"stage is {stage!r}, but should be one of {', '.join(stages_with('bench'))}")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to time on")
    subjects = [load(stage, spec) for spec in specs]
    kind, draw = DTYPES[dtype], Draw(seed)
    progress("measuring the ceilings: copy, product, launch")
    report = BenchReport(
        stage, asdict(layer.model), layer.ep_size, dtype, torch.cuda.get_device_name(), copy_bandwidth(draw),
        matrix_rate(draw, kind), launch_time(draw), _versions(), command, format=layer.format,
        fp8_rate=fp8_rate(draw) if layer.format.startswith("fp8") else 0.0,
    )  # fmt: skip
    try:
        _time_all(report, subjects, layer, tokens, kind, draw, rounds, progress)
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except RuntimeError as error:
        report.stopped = f"the device failed: {_first_line(error)}"
    return report


def _time_all(
    report: BenchReport, subjects: list[Subject], layer: TimedLayer, tokens: list[int], kind: torch.dtype, draw: Draw,
    rounds: int, progress: Callable[[str], None],
) -> None:  # fmt: skip
    part = needed_part(report.stage, "bench")
    own = getattr(part, "weights", None)
    weights = own(layer, kind, draw) if own else layer.weights(kind, draw) if hasattr(part, "NEEDS_WEIGHTS") else []
    with torch.no_grad():
        for count in tokens:
            progress(f"{report.stage}, {layer.model.name}: {count} tokens")
            batch = part.batch(layer, count, kind, weights, draw)
            for timing in _time_batch(subjects, batch, count, rounds):
                _add_floor(timing, batch, report)
                report.timings.append(timing)
