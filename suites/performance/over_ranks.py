"""Qwen3-30B-A3B over the GPUs of one host: decoding steps of every layout beside one GPU's, in one call.

    python3 suites/performance/over_ranks.py [--ranks 2] [--json FILE] [--layers 48] [--ways tp ep:symmetric ...]
    python3 suites/performance/over_ranks.py --ranks 4 --model qwen3-235b-a22b --ways tp ep:local_allreduce
    python3 suites/performance/over_ranks.py --ranks 2 --model qwen3-next-80b-a3b --ways tp ep:local_allreduce

Random weights in bf16, made on the devices.  For each batch two times:

    step_us     of a whole step, from token ids to sampled tokens, as a CUDA graph with every sequence at the mean
                context of the workload in whole_model.py; without a graph where a dispatcher reads counts back
    engine_us   of a step of the engine, the host's part included, over STEPS steps behind the prompts

With --kernels, also microseconds of each kernel of that step on rank 0, waiting for other ranks included.

Times are of the slowest rank.  Each way has its own time limit, and its processes are started anew behind one that
failed: what was measured before stays.  `+nccl` sums over ranks by NCCL, all other ways through symmetric memory.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.suites.performance.step_parts import decoding
from moe_harness.suites.performance.whole_model import BATCHES, CONFIG, random_model, workload

DISPATCHERS = (
    "local_allreduce", "symmetric", "allgather_reducescatter", "masked", "naive", "all_to_all", "all_to_all_dedup",
)  # fmt: skip
ONE = "one"  # GPU, rank 0's
WAYS = (ONE, "tp", *(f"ep:{name}" for name in DISPATCHERS), "tp+nccl", "ep:local_allreduce+nccl")
# 94 layers of twice the width; weights in bf16 are 470 GB.
LARGE = {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
}  # fmt: skip
# Three of four layers keep a state instead of keys; 512 experts. Weights in bf16 are 160 GB.
NEXT = {
    "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120, "moe_intermediate_size": 512,
    "num_experts": 512, "num_experts_per_tok": 10, "shared_expert_intermediate_size": 512, "rope_theta": 1e7,
    "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": CONFIG, "qwen3-235b-a22b": CONFIG | LARGE, "qwen3-next-80b-a3b": CONFIG | NEXT,
}  # fmt: skip
STEPS, WARM, REPLAYS = 48, 4, 20
PROFILED = 3  # steps
LIMIT = 150.0  # seconds of one way
PAGE = 32


def options_of(way: str) -> dict[str, Any]:
    """Arguments of load_model."""
    layout, _, sums = way.partition("+")
    _, _, dispatcher = layout.partition(":")
    found: dict[str, Any] = {"symmetric": sums != "nccl"}
    return found | ({"expert_parallel": True, "dispatcher": dispatcher} if dispatcher else {})


def build(way: str, keys: dict[str, Any], layers: int, batches: list[int], longest: int) -> Any:
    """The model of this rank with a cache for the largest batch, in sequences of up to `longest` tokens."""
    columns = -(-longest // PAGE)
    limits = {
        "max_sequences": max(batches), "max_tokens": 8192, "max_length": columns * PAGE, "page_size": PAGE,
        "prefixes": False, "pages": max(batches) * columns,
    }  # fmt: skip
    spread = {} if way == ONE else {"group": dist.group.WORLD, **options_of(way)}
    return random_model(layers, keys, **limits, **spread)


class Slowest:
    """The largest of the ranks' numbers; on one GPU its own."""

    def __init__(self, alone: bool):
        self.alone = alone

    def __call__(self, value: float) -> float:
        if self.alone:
            return value
        told = torch.tensor([value], device="cuda", dtype=torch.float64)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return float(told)

    def together(self) -> None:
        torch.cuda.synchronize()
        if not self.alone:
            dist.barrier()
            torch.cuda.synchronize()


@torch.inference_mode()
def step_of(model: Any, batch: int, slowest: Slowest) -> Callable[[], Any]:
    """Runs a decoding step, from a CUDA graph where the layout can be captured."""
    torch.cuda.manual_seed(batch)  # the same tokens on every rank
    filled, runner = decoding(model, batch, BATCHES[batch]), model.engine.runner
    run: Callable[[], Any] = lambda: runner.run(filled, padded=True)  # noqa: E731
    run()
    if not model.capturable:
        return run
    slowest.together()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


@torch.inference_mode()
def step_us(run: Callable[[], Any], slowest: Slowest) -> float:
    """Median microseconds of a decoding step, the slowest rank's."""
    times = []
    for i in range(WARM + REPLAYS):
        slowest.together()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end) * 1e3] if i >= WARM else []
    return slowest(statistics.median(times))


@torch.inference_mode()
def kernels(run: Callable[[], Any], slowest: Slowest) -> list[list[Any]]:
    """Name, launches and microseconds of each kernel of a step of this rank, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        slowest.together()  # here, since profilers start at different times; its own kernels are among those told
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)[:30]
    return [[row.key[:90], row.count / PROFILED, round(row.device_time_total / PROFILED, 1)] for row in rows]


def engine_us(model: Any, batch: int, slowest: Slowest) -> tuple[float, float]:
    """Microseconds of a decoding step through the engine, and seconds of the prompts before."""
    engine, vocabulary = model.engine, model.config.vocab_size
    length = BATCHES[batch] - STEPS // 2
    draw = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, vocabulary, (batch, length), generator=draw).tolist()
    slowest.together()
    began = time.perf_counter()
    most = model.options.max_length - length  # tokens: none of the sequences ends while steps are timed
    numbers = [engine.add(request) for request in model.requests(prompts, most, 0.6, 1, (), True)]
    while engine.scheduler.waiting or any(s.computed < length for s in engine.sequences.values()):
        engine.step()
    slowest.together()
    prefill = time.perf_counter() - began
    for _ in range(WARM):
        engine.step()
    slowest.together()
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    torch.cuda.synchronize()
    assert len(engine.sequences) == batch, "a sequence has ended"
    taken = slowest((time.perf_counter() - began) / STEPS * 1e6)
    for number in numbers:
        engine.abort(number)
    while engine.busy:
        engine.step()
    return taken, slowest(prefill)


def throughput(model: Any, slowest: Slowest, runs: int) -> list[float]:
    """Output tokens/s of the workload of whole_model.py, after a warm-up."""
    prompts, counts = workload()
    found = []
    for _ in range(1 + runs):
        slowest.together()
        began = time.perf_counter()
        tokens = sum(map(len, model.engine.generate(model.requests(prompts, counts, 0.6, 1, (), True))))
        torch.cuda.synchronize()
        found.append(round(tokens / slowest(time.perf_counter() - began), 1))
    return found[1:]


def measure(way: str, given: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """All batches of one way; what was measured is told after each."""
    slowest, batches = Slowest(alone=way == ONE), given.batches
    began = time.perf_counter()
    longest = 2048 if given.runs else max(BATCHES.values()) + STEPS + 64
    model = build(way, MODELS[given.model], given.layers, batches, longest)
    found: dict[str, Any] = {"way": way, "graphs": model.capturable, "batches": {}}
    found["build_seconds"] = round(time.perf_counter() - began, 1)
    found["weights_GB"] = round(sum(p.numel() * p.element_size() for p in model.network.p.values()) / 1e9, 2)
    for batch in batches:
        run = step_of(model, batch, slowest)
        entry: dict[str, float] = {"step_us": round(step_us(run, slowest), 1)}
        if given.kernels:
            found.setdefault("kernels", {})[str(batch)] = kernels(run, slowest)
        del run
        told, prefill = engine_us(model, batch, slowest)
        entry |= {"engine_us": round(told, 1), "prefill_seconds": round(prefill, 3)}
        found["batches"][str(batch)] = entry | {"tokens_per_second": round(batch / told * 1e6, 1)}
        tell(found)
    if given.runs:
        found["workload_tokens_per_second"] = throughput(model, slowest, given.runs)
    found["device_peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    torch.cuda.reset_peak_memory_stats()
    tell(found)


def run_rank(rank: int, given: argparse.Namespace, store: str, folder: str, ways: list[str]) -> None:
    """All `ways` one after the other; rank 0 writes what is found, any rank what went wrong."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    place, limit = dist.FileStore(store, given.ranks), timedelta(seconds=4 * LIMIT)
    dist.init_process_group("nccl", store=place, rank=rank, world_size=given.ranks, timeout=limit, device_id=device)
    for way in ways:
        Path(folder, f"{way}.started.{rank}").touch()

        def tell(found: dict[str, Any], way: str = way) -> None:
            if rank == 0:
                Path(folder, f"{way}.json").write_text(json.dumps(found))
                print(json.dumps(found), flush=True)

        try:
            if way != ONE or rank == 0:
                measure(way, given, tell)
        except BaseException:
            Path(folder, f"{way}.failed.{rank}").write_text(traceback.format_exc()[-3000:])
            os._exit(1)
        gc.collect()
        torch.cuda.empty_cache()
        dist.barrier()
        torch.cuda.synchronize()
        Path(folder, f"{way}.done.{rank}").touch()
    os._exit(0)  # captured collectives make an orderly end slow


def watched(given: argparse.Namespace, ways: list[str], folder: str) -> None:
    """Ranks that measure `ways`, ended where one way takes too long or one of them fails."""
    store = tempfile.mktemp(dir=folder)
    context = mp.spawn(run_rank, (given, store, folder, ways), nprocs=given.ranks, join=False)
    began, done = time.monotonic(), 0
    while any(process.is_alive() for process in context.processes):
        time.sleep(0.2)
        now_done = sum(Path(folder, f"{way}.done.0").exists() for way in ways)
        if now_done > done:
            began, done = time.monotonic(), now_done
        failed = any(process.exitcode for process in context.processes)
        if failed or time.monotonic() - began > given.limit + (30 if done == 0 else 0):
            time.sleep(1)  # for the others to say what they have to
            for process in context.processes:
                process.kill()
            for process in context.processes:
                process.join()
            return


def collected(found: dict[str, Any], ways: list[str], folder: str, ranks: int) -> None:
    """Put what lies in the folder into `found`."""
    for way in ways:
        file = Path(folder, f"{way}.json")
        if file.exists():
            found["ways"][way] = json.loads(file.read_text())
        complaints = [Path(folder, f"{way}.failed.{rank}") for rank in range(ranks)]
        told = [path.read_text() for path in complaints if path.exists()]
        if told:
            found["failures"][way] = told[0]
        elif Path(folder, f"{way}.started.0").exists() and not Path(folder, f"{way}.done.0").exists():
            found["failures"][way] = "it took longer than its limit"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("over_ranks.json"))
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="all of the model's")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one way")
    parser.add_argument("--runs", type=int, default=0, help="of the workload of whole_model.py, beside the steps")
    parser.add_argument("--kernels", action="store_true", help="time each kernel of a step")
    given = parser.parse_args()
    given.layers = given.layers or MODELS[given.model]["num_hidden_layers"]
    if torch.cuda.device_count() < given.ranks:
        parser.error(f"--ranks is {given.ranks}, but there are {torch.cuda.device_count()} GPUs")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    found: dict[str, Any] = {
        "command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "ranks": given.ranks,
        "versions": {"torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
        "model": given.model, "layers": given.layers, "contexts": {str(b): BATCHES[b] for b in given.batches},
        "ways": {}, "failures": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        left = list(given.ways)
        while left:
            watched(given, left, folder)
            collected(found, left, folder, given.ranks)
            given.json.write_text(json.dumps(found, indent=1))
            finished = [way for way in left if Path(folder, f"{way}.done.0").exists()]
            left = left[len(finished) + 1 :]  # without the one that failed
    print_table(found)
    raise SystemExit(1 if found["failures"] else 0)


def print_table(found: dict[str, Any]) -> None:
    """Milliseconds of a step of the engine, and how many times one GPU's speed that is."""
    one = found["ways"].get(ONE, {"batches": {}})["batches"]
    for kind in ("step_us", "engine_us"):
        for way, told in found["ways"].items():
            cells = [f"{b}: {entry[kind] / 1e3:.2f} ms ({one[b][kind] / entry[kind]:.2f})" if b in one
                     else f"{b}: {entry[kind] / 1e3:.2f} ms" for b, entry in told["batches"].items()]  # fmt: skip
            print(f"{kind:10} {way:28}", "  ".join(cells))
    for way, words in found["failures"].items():
        print(f"{way} failed: {words.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
