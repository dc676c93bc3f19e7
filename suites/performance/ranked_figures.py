"""The page's figures over several GPUs, from the files of dispatch.py and expert_parallel.py (see figures.py)."""

import json
from typing import Any

from moe_harness.suites.performance import DATA, header, row

RANKS = (2, 4)
FEW = 64  # tokens
# What one scheme of dispatch.py is called in the table; "+equal" and "+bound" are what the ranks know beforehand.
SCHEMES = {
    "naive": "`naive`",
    "local_allreduce": "`local_allreduce`",
    "allgather_reducescatter": "`allgather_reducescatter`",
    "allgather_reducescatter+equal": "the same, numbers of tokens known",
    "all_to_all": "`all_to_all`",
    "all_to_all_dedup": "`all_to_all_dedup`",
    "masked+bound": "`masked`, bound known",
    "symmetric": "`symmetric`, ranks compare their numbers",
    "symmetric+bound": "`symmetric`, bound known",
}
WAYS = {
    "eager_us": "called",
    "replayed_us": "called through `replayed.py`",
    "graph_us": "in a CUDA graph",
}


def read(name: str, ranks: int) -> dict[str, Any]:
    return json.loads((DATA / f"{name}_h200x{ranks}.json").read_text())


def numbers_of_tokens(report: dict[str, Any]) -> list[int]:
    return sorted({entry["tokens_per_rank"] for entry in report["table"]})


def dispatch() -> list[str]:
    """Dispatch and combine on four GPUs: microseconds (times the floor, where the floor is more than a launch)."""
    report = read("dispatch", 4)
    found = {(entry["scheme"], entry["tokens_per_rank"]): entry for entry in report["table"]}
    tokens = numbers_of_tokens(report)
    lines = header("scheme", *tokens)
    return lines + [
        row(name, *(_dispatch_cell(found.get((scheme, t))) for t in tokens)) for scheme, name in SCHEMES.items()
    ]


def _dispatch_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    time, ratio = f"{entry['dispatch_combine_us']:.0f}", entry["over_floor"]
    return time if entry["floor_us"] < 1 else f"{time} ({ratio:.{0 if ratio >= 10 else 1}f})"


def symmetric() -> list[str]:
    """How many times as fast as NCCL the scheme over symmetric memory is with few tokens, both knowing the numbers."""
    called, graphs = (f"{min(found):.1f} to {max(found):.1f}" for found in map(_over_nccl, ("table", "graphs")))
    known = "NCCL with the same knowledge on two and four GPUs"
    return [f"With up to {FEW} tokens `symmetric` was {called} times as fast as {known}, and {graphs} in CUDA graphs."]


def _over_nccl(part: str) -> list[float]:
    found = []
    for ranks in RANKS:
        times: dict[str, dict[int, float]] = {}
        for entry in read("dispatch", ranks)[part]:
            times.setdefault(entry["scheme"], {})[entry["tokens_per_rank"]] = entry["dispatch_combine_us"]
        nccl, ours = times["allgather_reducescatter+equal"], times["symmetric+bound"]
        found += [nccl[tokens] / ours[tokens] for tokens in nccl if tokens <= FEW]
    return found


def expert_parallel() -> list[str]:
    """How many times as fast as transformers' fastest block our fastest is, both in the same way."""
    lines = header("tokens per rank", *numbers_of_tokens(read("expert_parallel", RANKS[0])))
    for ranks in RANKS:
        report = read("expert_parallel", ranks)
        for way, name in WAYS.items():
            cells = (
                f"{fastest(report, way, t, ours=False) / fastest(report, way, t, ours=True):.1f}"
                for t in numbers_of_tokens(report)
            )
            lines.append(row(f"{ranks} GPUs, {name}", *cells))
    return lines


def fastest(report: dict[str, Any], way: str, tokens: int, ours: bool) -> float:
    """Microseconds of the fastest block of ours, or of transformers'."""
    return min(
        entry[way]
        for entry in report["table"]
        if entry["tokens_per_rank"] == tokens and entry.get(way)
        and ours != entry["block"].startswith("transformers:")
    )  # fmt: skip
