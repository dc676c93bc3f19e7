"""The whole of Qwen3-30B-A3B on one GPU: output tokens/s on the workload of nano-vllm's benchmark, and a step's parts.

    python3 suites/performance/whole_model.py ours --json FILE [--layers 48] [--runs 5]
    python3 suites/performance/whole_model.py vllm --json FILE [--layers 48] [--runs 5]     (vLLM importable)
    python3 suites/performance/whole_model.py transformers --json FILE [--layers 48]

Random weights, made on the device.  256 requests, drawn with seed 0: prompts of 100 to 1,024 random ids, then outputs
of 100 to 1,024 tokens each, temperature 0.6, no end of sequence; prefix caches off.  The first run is a warm-up and is
told apart.  transformers generates 16 and 64 tokens after the first 256 of every prompt, since the whole would take ten
minutes: shorter contexts and no row that ends early, both in its favour.  `ours` checks first that the engine is right
on a small model: tokens with graphs as without, logits against the fp64 reference.  Components of a decoding step are
timed as CUDA graphs over all layers, so that weights come from memory.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.suites.performance.step_parts import chunks, components, decoding, graph_time, kernels  # noqa: E402

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None, "max_position_embeddings": 40960,
    "attention_bias": False, "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "bfloat16",
    "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
BATCHES = {1: 903, 8: 903, 64: 903, 256: 684}  # sequences of a step and their mean context in the workload
VLLM_SETTINGS = {
    "VLLM_USE_DEEP_GEMM": "0", "VLLM_MOE_USE_DEEP_GEMM": "0", "VLLM_DEEP_GEMM_WARMUP": "skip", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
}  # fmt: skip


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths."""
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    return prompts, [random.randint(100, 1024) for _ in range(256)]


class Results:
    """What was found so far, written after every part: a later part that fails takes nothing with it."""

    def __init__(self, file: Path, **about: Any):
        self.file = file
        self.found: dict[str, Any] = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), **about}
        self.found["versions"] = {"torch": torch.__version__}
        self.failed = False

    def write(self, **values: Any) -> None:
        self.found |= values
        self.file.write_text(json.dumps(self.found, indent=1))
        print(json.dumps(values)[:600], flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part of the run; what it raises is written down."""
        start = time.perf_counter()
        try:
            yield
        except Exception:
            self.failed = True
            self.write(**{f"{name}_failed": traceback.format_exc()[-3000:]})
        print(f"[{name}: {time.perf_counter() - start:.1f} s]", flush=True)


def random_model(layers: int, keys: dict[str, Any] = CONFIG, **options: Any) -> Any:
    """The model with random weights on the device, without files; of one rank where a group is among the options.

    What every rank holds whole is the same on all of them.
    """
    from moe_harness.impls.qwen3_moe.config import Config
    from moe_harness.impls.qwen3_moe.model import assembled

    def fill(layout: Any, parameters: dict[str, torch.Tensor]) -> None:
        everywhere = torch.Generator("cuda").manual_seed(0)
        own = torch.Generator("cuda").manual_seed(1 + layout.placement.rank)
        for name, parameter in parameters.items():
            if "norm" in name:
                parameter.fill_(1)
                continue
            draw = everywhere if name.endswith("mlp.gate.weight") else own
            parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5, generator=draw)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(keys | {"num_hidden_layers": layers}))
        config = Config.read(Path(folder))
    return assembled(config, fill, device=f"cuda:{torch.cuda.current_device()}", dtype=torch.bfloat16, **options)


def check(results: Results) -> None:
    """The engine on a small random checkpoint: graphs = eager, chunks and preemption = neither, logits = reference."""
    from moe_harness.fixtures import checkpoints
    from moe_harness.harness.stages.model.noise import logit_bound
    from moe_harness.impls.qwen3_moe.model import load_model
    from moe_harness.reference.model import Model

    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.make(Path(name), "qwen3_moe", head_dim=128, hidden_size=256, moe_intermediate_size=128)
        keys = json.loads((folder / "config.json").read_text())
        ids = torch.randint(0, 128, (3, 70), generator=torch.Generator().manual_seed(0))
        prompts = [row[:length].tolist() for row, length in zip(ids.repeat(4, 1), range(3, 70, 6), strict=False)]
        found = {}
        for kind, options in {
            "graphs": {}, "eager": {"graphs": False}, "tight": {"pages": 24, "max_tokens": 16, "max_sequences": 16},
        }.items():  # fmt: skip
            options = {"max_sequences": 24, "pages": 400} | options
            model = load_model(folder, device="cuda", dtype="fp32", page_size=16, max_length=256, **options)
            found[kind] = model.generate(prompts, max_new_tokens=40, ignore_eos=True)
            found[f"{kind}_preemptions"] = model.engine.scheduler.preemptions
        model = load_model(folder, device="cuda", dtype="bf16", page_size=16, max_length=256)
        bound = logit_bound(Model(keys, checkpoints.tensors(keys)), ids, torch.bfloat16)
        z = bound.z(model(ids).cpu()).abs()
    results.write(
        check={
            "graphs = eager": found["graphs"] == found["eager"],
            "tight = eager": found["tight"] == found["eager"],
            "preemptions": found["tight_preemptions"],
            "logits: median |z|": float(z.median()),
            "logits: share of |z| under 9": float((z < 9).double().mean()),
        }  # fmt: skip
    )


def timed_runs(results: Results, runs: int, generate: Callable[[], int], name: str = "runs") -> None:
    """Output tokens/s of a warm-up and of `runs` runs."""
    found = []
    for _ in range(1 + runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = generate()
        torch.cuda.synchronize()
        found.append(tokens / (time.perf_counter() - start))
        warm = found[1:]
        results.write(**{name: {
            "warm_up": found[0], "tokens_per_second": warm, "median": statistics.median(warm) if warm else None,
        }})  # fmt: skip


def trace(model: Any) -> dict[str, Any]:
    """One run of the workload, step by step: how many, how long, by kind and size; and the host's part."""
    prompts, counts = workload()
    engine, rows = model.engine, []
    launch, plan = engine.runner.launch, engine.scheduler.plan
    host = {"plan": 0.0, "launch": 0.0}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            host[name] += time.perf_counter() - start
            return out

        return call

    engine.runner.launch, engine.scheduler.plan = timed("launch", launch), timed("plan", plan)
    for request in sorted(model.requests(prompts, counts, 0.6, 1, (), True), key=lambda r: -r.max_new_tokens):
        engine.add(request)  # in the order of `generate`
    last = time.perf_counter()
    begin = last
    while engine.busy:
        before = engine.under_way
        engine.step()
        now = time.perf_counter()
        if before is not None:
            rows.append((len(before.step.work), before.step.decoding, before.step.tokens, now - last))
        last = now
    engine.runner.launch, engine.scheduler.plan = launch, plan
    kinds: dict[str, list[float]] = defaultdict(list)
    for work, decoded, tokens, seconds in rows:
        size = next(f"decode {low + 1}-{high}" for low, high in RANGES if work <= high)
        kinds[size if decoded == work else f"with chunks, {tokens // 1024 * 1024}+ tokens"].append(seconds * 1e3)
    return {
        "seconds": last - begin, "steps": len(rows), "host_seconds": host, "preemptions": engine.scheduler.preemptions,
        "kinds": {k: {"steps": len(v), "seconds": sum(v) / 1e3, "median_ms": statistics.median(v)}
                  for k, v in sorted(kinds.items())},
    }  # fmt: skip


RANGES = ((0, 16), (16, 32), (32, 64), (64, 128), (128, 192), (192, 256))


def ours(arguments: argparse.Namespace, results: Results) -> None:
    """Check, workload, trace, components."""
    if "check" in arguments.parts:
        with results.part("check"):
            check(results)
    model: Any = None
    with results.part("load"), torch.inference_mode():
        model = random_model(
            arguments.layers, max_sequences=256, max_tokens=arguments.max_tokens, max_length=2048,
            page_size=arguments.page_size, prefixes=False, pages=arguments.pages,
        )  # fmt: skip
        start = time.perf_counter()
        engine = model.engine
        results.write(pages=engine.scheduler.pages.total, engine_seconds=time.perf_counter() - start)
    prompts, counts = workload()
    if arguments.runs:
        with results.part("workload"):
            requests = model.requests(prompts, counts, 0.6, 1, (), True)
            timed_runs(results, arguments.runs, lambda: sum(map(len, model.engine.generate(requests))))
    if "trace" in arguments.parts:
        with results.part("trace"):
            results.write(trace=trace(model))
    if "kernels" in arguments.parts:
        with results.part("kernels"):
            steps = {f"kernels_{batch}": (decoding, batch, context) for batch, context in BATCHES.items()}
            for name, (make, *sizes) in (steps | {"kernels_chunks": (chunks, arguments.max_tokens)}).items():
                filled = make(model, *sizes)
                results.write(**{name: kernels(model, filled, padded=filled.decoding > 0)})
    for batch, context in BATCHES.items() if "components" in arguments.parts else ():
        with results.part(f"components_{batch}"):
            results.write(**{f"components_{batch}": components(model, batch, context)})


@torch.inference_mode()
def flash_attention_3(batch: int, context: int, page: int, layers: int = 8) -> float:
    """Microseconds of one layer's decoding attention with the FlashAttention 3 of vLLM's wheel."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    columns = -(-context // page)
    caches = torch.randn(layers, 2, batch * columns, page, 4, 128, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(batch * columns, device="cuda").int().view(batch, columns)
    q = torch.randn(batch, 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    used = torch.full((batch,), context, device="cuda", dtype=torch.int32)

    def run() -> None:
        for keys, values in caches:
            flash_attn_varlen_func(
                q=q, k=keys, v=values, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=context, seqused_k=used,
                block_table=tables, softmax_scale=128**-0.5, causal=True, fa_version=3,
            )  # fmt: skip

    return graph_time(run) / layers


def vllm(arguments: argparse.Namespace, results: Results) -> None:
    """The same workload through vLLM, with what its wheel brings along and nothing fetched."""
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    with results.part("fa3"):
        for batch, context in BATCHES.items() if arguments.tp == 1 else ():
            results.write(**{f"fa3_{batch}": {"us": flash_attention_3(batch, context, arguments.page_size)}})
    from vllm import LLM, SamplingParams, __version__

    results.found["versions"]["vllm"] = __version__
    with tempfile.TemporaryDirectory() as folder, results.part("vllm"):
        Path(folder, "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": arguments.layers}))
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=2048,
            dtype="bfloat16", gpu_memory_utilization=0.92, tensor_parallel_size=arguments.tp,
        )  # fmt: skip
        prompts, counts = workload()
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        options = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, detokenize=False) for count in counts
        ]

        def generate() -> int:
            return sum(len(out.outputs[0].token_ids) for out in llm.generate(asked, options, use_tqdm=False))

        timed_runs(results, arguments.runs, generate)


def transformers(arguments: argparse.Namespace, results: Results) -> None:
    """A batch of 256 through transformers' generate, experts by grouped_mm; also without the prompts' part."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, __version__

    results.found["versions"]["transformers"] = __version__
    with results.part("load"), torch.device("cuda"):
        config = Qwen3MoeConfig(**CONFIG | {"num_hidden_layers": arguments.layers})
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        module.set_experts_implementation("grouped_mm")
    rows = [prompt[:256] for prompt in workload()[0]]
    ids = torch.tensor([[0] * (256 - len(row)) + row for row in rows], device="cuda")
    mask = torch.tensor([[0] * (256 - len(row)) + [1] * len(row) for row in rows], device="cuda")

    @torch.inference_mode()
    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = module.generate(
            ids, attention_mask=mask, do_sample=True, temperature=0.6, top_k=0, top_p=1.0, max_new_tokens=count,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert out.shape[1] == 256 + count
        return time.perf_counter() - start

    with results.part("transformers"):
        seconds(4)
        short, long = seconds(16), seconds(64)
        results.write(
            batch=len(rows), seconds={16: short, 64: long}, tokens_per_second=len(rows) * 64 / long,
            decoding_tokens_per_second=len(rows) * 48 / (long - short),
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=("ours", "vllm", "transformers"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--runs", type=int, default=5, help="of the workload; 0 leaves it out")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of vLLM; over_ranks.py measures ours")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of one step of ours")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--pages", type=int, default=None)
    parser.add_argument("--parts", default="check,trace,kernels,components", help="of ours, beside the workload")
    chosen = parser.parse_args()
    told = Results(chosen.json, engine=chosen.engine, layers=chosen.layers)
    {"ours": ours, "vllm": vllm, "transformers": transformers}[chosen.engine](chosen, told)
    sys.exit(told.failed)
