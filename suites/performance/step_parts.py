"""One step of the engine on a GPU, taken apart: its parts over their floors, and its kernels one by one."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BANDWIDTH, FLOPS = 4.3e12, 690e12  # of an H200, measured


def graph_time(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median microseconds of a CUDA graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


@torch.inference_mode()
def decoding(model: Any, batch: int, context: int) -> Any:
    """A decoding step of `batch` sequences with so many keys each, in random pages, put into the runner's block."""
    from moe_harness.impls.qwen3_moe.batch import Filled

    runner, page = model.engine.runner, model.options.page_size
    b = runner.block
    runner._blank(batch)
    columns = -(-context // page)
    order = torch.randperm(model.engine.scheduler.pages.total, device="cuda")[: batch * columns]
    b["tables"][:batch, :columns] = order.view(batch, columns)
    b["context"][:batch], b["positions"][:batch] = context, context - 1
    b["slots"][:batch] = b["tables"][:batch, columns - 1] * page + (context - 1) % page
    b["rows"][:batch], b["temperature"][:batch] = torch.arange(batch, device="cuda"), 0.6
    b["states"][:batch] = torch.arange(batch, device="cuda")  # of layers that keep one instead of keys
    b["ids"][:batch] = torch.randint(0, 10000, (batch,), device="cuda")
    return Filled(batch, batch, batch, batch, cut=False)


@torch.inference_mode()
def chunks(model: Any, tokens: int, length: int = 512) -> Any:
    """A step of so many tokens of prompts of `length`, put into the runner's block."""
    from moe_harness.impls.qwen3_moe.batch import Filled

    runner, page = model.engine.runner, model.options.page_size
    b, count, columns = runner.block, tokens // length, -(-length // page)
    runner._blank(count)
    order = torch.randperm(model.engine.scheduler.pages.total, device="cuda")[: count * columns]
    b["tables"][:count, :columns] = order.view(count, columns)
    b["context"][:count] = length
    b["query_start"][: count + 1] = torch.arange(0, tokens + 1, length, device="cuda")
    position = torch.arange(tokens, device="cuda") % length
    b["positions"][:tokens] = position
    pages = b["tables"][:count].repeat_interleave(length, 0).gather(1, (position // page)[:, None])[:, 0]
    b["slots"][:tokens] = pages * page + position % page
    b["last"][:count] = torch.arange(length - 1, tokens, length, device="cuda")
    b["rows"][:count], b["temperature"][:count] = torch.arange(count, device="cuda"), 0.6
    b["ids"][:tokens] = torch.randint(0, 10000, (tokens,), device="cuda")
    return Filled(tokens, count, 0, count, cut=False)


@torch.inference_mode()
def kernels(model: Any, filled: Any, padded: bool) -> dict[str, Any]:
    """Every kernel of a step called without a graph: launches, microseconds; and the step from its start to its end."""
    runner, repeats = model.engine.runner, 3
    runner.run(filled, padded=padded)
    torch.cuda.synchronize()
    walls, hosts = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        runner.run(filled, padded=padded)
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            runner.run(filled, padded=padded)
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    return {
        "wall_us": round(statistics.median(walls) * 1e6), "host_us": round(statistics.median(hosts) * 1e6),
        "kernels_us": round(sum(row.device_time_total for row in rows) / repeats),
        "kernels": [
            [row.key[:90], row.count // repeats, round(row.device_time_total / repeats, 1)] for row in rows[:30]
        ],
    }  # fmt: skip


@torch.inference_mode()
def components(model: Any, batch: int, context: int) -> dict[str, dict[str, float]]:
    """Microseconds of each part of a decoding step, over all layers, and its floor."""
    import torch.nn.functional as F

    from moe_harness.impls.qwen3_moe.network import Flat
    from moe_harness.impls.qwen3_moe.outputs import BySlot, Parts

    runner, network, c, p = model.engine.runner, model.network, model.config, model.network.p
    k, layers, b = network.kernels, range(c.layers), runner.block
    filled = decoding(model, batch, context)
    flat = Flat(
        b["positions"][:batch], b["slots"][:batch], b["query_start"][: batch + 1], b["context"][:batch],
        b["tables"][:batch], batch, True,
    )  # fmt: skip
    x = torch.randn(batch, c.hidden_size, device="cuda", dtype=torch.bfloat16)
    h = torch.randn_like(x)
    qkv = F.linear(x, p["model.layers.0.self_attn.qkv_proj.weight"])
    q, key, value = qkv.unflatten(-1, (-1, c.head_dim)).split((c.heads, c.kv_heads, c.kv_heads), dim=1)
    turned = torch.randn(batch, c.heads, c.head_dim, device="cuda", dtype=torch.bfloat16)
    mixed = turned.flatten(1)
    logits = F.linear(x, p["model.layers.0.mlp.gate.weight"])
    weights, ids = k.router(logits, top_k=c.top_k, renormalize=True)
    head = F.linear(x, network.head)
    name = "model.layers.{}.".format

    def experts(i: int) -> torch.Tensor:
        up, down = (p[f"{name(i)}mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
        return k.joined.experts_by_slot(x, up, down, ids, activation=c.activation)

    def output(i: int) -> Any:
        parts = network._in_parts(f"{name(i)}self_attn.o_proj", mixed, flat)
        return F.linear(mixed, p[f"{name(i)}self_attn.o_proj.weight"]) if parts is None else Parts(parts)

    by_slot, attended = BySlot(experts(0), weights, ids), output(0)

    def norms(i: int) -> None:
        network.norm(f"{name(i)}input_layernorm.weight", by_slot, h)
        network.norm(f"{name(i)}post_attention_layernorm.weight", attended, h)

    keys, values = runner.cache.keys, runner.cache.values
    parts: dict[str, Callable[[int], Any]] = {
        "qkv": lambda i: F.linear(x, p[name(i) + "self_attn.qkv_proj.weight"]),
        "rope_cache": lambda i: network._of_step(flat).rope_cache(
            q, key, value, flat.positions, flat.slots, keys[i], values[i], eps=c.eps, theta=c.theta,
            q_norm=p[name(i) + "self_attn.q_norm.weight"], k_norm=p[name(i) + "self_attn.k_norm.weight"],
        ),
        "attention": lambda i: network.attend(turned, flat, keys[i], values[i]),
        "o_proj": output,  # in parts where a step has it so, which the second norm then adds up
        "norms": norms,  # the experts' sum joined to the first
        "router": lambda i: network.route(name(i) + "mlp", x, flat.pads),
        "experts": experts,
    }  # fmt: skip
    found = {part: graph_time(lambda run=run: [run(i) for i in layers]) for part, run in parts.items()}
    found["lm_head"] = graph_time(lambda: F.linear(x, network.head))
    found["sampler"] = graph_time(lambda: runner._sample(head, batch))
    found["step"] = graph_time(lambda: runner.run(filled, padded=True))
    touched, of_step = len(ids.unique()), touched_by_step(runner, filled)
    floors = floor(c, batch, context, touched)
    floors["step"] = floor(c, batch, context, of_step)["step"]
    return {"experts_touched": {"count": touched, "of_step": of_step}} | {
        part: {"us": round(us, 1), "floor_us": round(floors[part], 1), "ratio": round(us / floors[part], 3)}
        for part, us in found.items()
    }


def touched_by_step(runner: Any, filled: Any) -> float:
    """How many experts a layer of the step reads, the mean over its layers."""
    network, counts = runner.network, []
    route = network.route

    def counted(*given: Any) -> Any:
        weights, ids = route(*given)
        counts.append(len(ids[ids >= 0].unique()))
        return weights, ids

    network.route = counted
    try:
        runner.run(filled, padded=True)
    finally:
        del network.route  # of the instance: the class has it
    return statistics.mean(counts)


def floor(c: Any, batch: int, context: int, touched: float) -> dict[str, float]:
    """Microseconds of what has to be read, written or multiplied, over all layers."""
    H, D, element = c.hidden_size, c.head_dim, 2  # noqa: N806
    q, kv = c.heads * D, c.kv_heads * D

    def cost(elements: float, flops: float = 0.0) -> float:
        return max(elements * element / BANDWIDTH, flops / FLOPS) * 1e6

    def product(rows: int, depth: int, columns: int) -> float:
        return cost(depth * columns + rows * (depth + columns), 2 * rows * depth * columns)

    slots = batch * c.top_k
    layer = {
        "qkv": product(batch, H, q + 2 * kv),
        "rope_cache": cost(batch * 2 * (q + 2 * kv)),
        "attention": cost(batch * (context * 2 * kv + 2 * q)),
        "o_proj": product(batch, q, H),
        "norms": cost(batch * (2 * 4 + c.top_k) * H),
        "router": product(batch, H, c.num_experts),
        "experts": cost(touched * 3 * H * c.expert_size + batch * H + slots * H, 2 * slots * 3 * H * c.expert_size),
    }
    found = {part: us * c.layers for part, us in layer.items()}
    found["lm_head"] = product(batch, H, c.vocab_size)
    found["sampler"] = cost(batch * c.vocab_size)
    return found | {"step": sum(found.values())}
