"""The figures of a whole model and of quantised experts in docs/benches.md, from the files that their runs wrote."""

import json
from statistics import median
from typing import Any

from moe_harness.suites.performance import DATA, header, row

PARTS = {
    "experts": "experts", "attention": "attention", "qkv": "projection before attention", "o_proj": "and behind it",
    "router": "gate, routing, pads", "norms": "norms and residuals, with the experts' sum", "rope_cache": "rope_cache",
    "lm_head": "head", "sampler": "sampler",
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text())


def speeds(run: dict[str, Any]) -> str:
    """The median of the warm runs, and all of them."""
    warm = run["runs"]["tokens_per_second"]
    return f"{median(warm):,.0f} ({', '.join(f'{speed:,.0f}' for speed in warm)})"


def ahead(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """By how much the median of one is above the other's."""
    return median(ours["runs"]["tokens_per_second"]) / median(theirs["runs"]["tokens_per_second"]) - 1


def whole_model() -> list[str]:
    """Tokens per second beside vLLM's, and where the time of a decoding step goes."""
    ours, theirs = read("whole_model_h200.json"), read("whole_model_vllm_h200.json")
    peer = read("whole_model_transformers_h200.json")
    sizes = [int(name.removeprefix("components_")) for name in ours if name.startswith("components_")]
    parts = {n: ours[f"components_{n}"] for n in sizes}
    layers = ours["layers"]
    about = (
        f"One {ours['device']}, torch {ours['versions']['torch']}, both in one call: ours {speeds(ours)} output "
        f"tokens/s, vLLM {theirs['versions']['vllm']} {speeds(theirs)}, so ours {ahead(ours, theirs):.1%} more. The "
        f"runs before those, in which kernels are compiled and graphs captured: {ours['runs']['warm_up']:,.0f} and, "
        f"behind a start of its own, {theirs['runs']['warm_up']:,.0f}."
    )
    generated = (
        f"transformers {peer['versions']['transformers']}'s `generate` with `grouped_mm`, {peer['batch']} prompts of "
        f"256 tokens and 64 new ones, in a session of its own: {peer['tokens_per_second']:,.0f}, or "
        f"{peer['decoding_tokens_per_second']:,.0f} without the prompts' part. Ours is "
        f"{median(ours['runs']['tokens_per_second']) / peer['tokens_per_second']:.1f} times as fast as the former."
    )
    step = f"A decoding step, in ms of all {layers} layers (how many times its floor at 4.3 TB/s and 690 TFLOP/s):"
    lines = [about, "", generated, "", step, "", *header("sequences", *sizes)]
    for name, told in PARTS.items():
        lines.append(row(told, *(_part(parts[n][name]) for n in sizes)))
    lines.append(row("the step", *(_part(parts[n]["step"]) for n in sizes)))
    attention = [f"{parts[n]['attention']['us'] / layers:.1f}" for n in sizes]
    lines += ["", "Attention of one layer, in us:", "", *header("sequences", *sizes), row("ours", *attention)]
    lines.append(row("FlashAttention 3 of vLLM's wheel", *(f"{theirs[f'fa3_{n}']['us']:.1f}" for n in sizes)))
    return lines


def _part(part: dict[str, float]) -> str:
    return f"{part['us'] / 1e3:.2f} ({part['ratio']:.2f})" if part["floor_us"] > 10 else f"{part['us'] / 1e3:.2f}"


def quantized() -> list[str]:
    """Kernels in the formats in which weights are shipped, ours and others', timed in one run each."""
    lines = []
    for path in sorted(DATA.glob("quantized-*.json")):
        run = read(path.name)
        tokens = sorted({timing["tokens"] for timing in run["timings"]})
        table: dict[str, dict[int, str]] = {}
        for timing in run["timings"]:
            told = f"{timing['median']:.0f} ({timing['median'] / timing['floor']:.2f})"
            table.setdefault(timing["spec"], {})[timing["tokens"]] = told
        part = f", one rank of EP {run['ep_size']}" if run["ep_size"] > 1 else ""
        about = f"{run['model']['name']}{part}, {run['format']}, {run['device']}, torch {run['versions']['torch']}"
        lines += [f"[{about}](../suites/performance/data/{path.name}):", "", *header("tokens", *tokens)]
        lines += [*(row(f"`{spec}`", *(found.get(n, "-") for n in tokens)) for spec, found in table.items()), ""]
    return lines[:-1]
