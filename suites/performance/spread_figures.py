"""The page's figures of a whole model over GPUs, from the files of over_ranks.py and sum_norm.py.

A file's name says how many GPUs it is of; every number of them that was run has tables of its own.
"""

import json
import re
from statistics import median
from typing import Any

from moe_harness.suites.performance import DATA, header, row

NAMES = {"one": "one GPU", "tp": "columns of all experts", "ep": "whole experts"}


def files(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of the files of one command, the fewest GPUs first."""
    found = sorted(DATA.glob(f"{name}_h200x*.json"), key=lambda path: int(re.sub(r".*x", "", path.stem)))
    return [(path.name, json.loads(path.read_text())) for path in found]


def about(file: str, run: dict[str, Any]) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in run["versions"].items())
    return f"[{run['ranks']} x {run['device']}](../suites/performance/data/{file}), {versions}"


def told_of(way: str) -> str:
    """A way of over_ranks.py in words."""
    layout, _, sums = way.partition("+")
    kind, _, dispatcher = layout.partition(":")
    words = NAMES[kind] + (f", `{dispatcher}`" if dispatcher else "")
    return words + (", sums by NCCL" if sums else "")


def over_ranks(name: str = "over_ranks") -> list[str]:
    """Milliseconds of a decoding step by layout and dispatcher, and how many times one GPU's speed that is."""
    lines: list[str] = []
    for file, run in files(name):
        one = run["ways"].get("one", {"batches": {}})["batches"]
        batches = list(run["contexts"])
        contexts = ", ".join(str(run["contexts"][batch]) for batch in batches)
        lines += [f"{about(file, run)}, {run['layers']} layers; sequences with {contexts} keys each:", ""]
        lines += header("sequences", *batches)
        for way, told in run["ways"].items():
            cells = [_cell(told["batches"].get(batch), one.get(batch)) for batch in batches]
            name = told_of(way) + ("" if told["graphs"] else ", no graph")
            lines.append(row(name + (" (an earlier call)" if told.get("earlier") else ""), *cells))
        lines.append("")
    return lines[:-1]


def _cell(entry: dict[str, float] | None, one: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    if one is None:
        return f"{entry['engine_us'] / 1e3:.2f}"
    return f"{entry['engine_us'] / 1e3:.2f} ({one['engine_us'] / entry['engine_us']:.2f})"


def large(name: str = "over_ranks_235b") -> list[str]:
    """The same of a model that no GPU holds alone, with output tokens per second and what a GPU holds."""
    lines = over_ranks(name)
    for _, run in files(name):
        for way, told in run["ways"].items():
            speeds = ", ".join(f"{entry['tokens_per_second']:,.0f}" for entry in told["batches"].values())
            held = f"{told['weights_GB']:.1f} GB of weights on each GPU, {told['device_peak_GB']:.1f} GB with the cache"
            lines += ["", f"{told_of(way).capitalize()}: {speeds} output tokens/s;", f"{held}."]
    return lines


def workload() -> list[str]:
    """Output tokens/s of the workload of whole_model.py on two GPUs, beside vLLM's."""
    (_, ours), (_, theirs) = *files("workload"), *files("workload_vllm")
    own, other = ours["ways"]["tp"]["workload_tokens_per_second"], theirs["runs"]["tokens_per_second"]
    told = [f"{median(runs):,.0f} ({', '.join(f'{run:,.0f}' for run in runs)})" for runs in (own, other)]
    more = f"{median(own) / median(other) - 1:.1%}"
    return [
        "Two GPUs, columns of all experts, the workload of `whole_model.py` in one call:",
        f"ours {told[0]} output tokens/s,",
        f"vLLM {theirs['versions']['vllm']} with `--tp 2` {told[1]}, so ours {more} more.",
    ]


def loading() -> list[str]:
    """Seconds until the last rank has its weights, and the peak of the host's memory as a share of the rank's."""
    ((file, run),) = files("loading")
    size, speed = f"{run['checkpoint_bytes'] / 1e9:.1f} GB of files", f"{run['file_GB_per_s']:.2f} GB/s"
    where = f"{run['device']}, torch {run['versions']['torch']}, {run['layers']} layers"
    lines = [
        f"[{where}](../suites/performance/data/{file}), {size}, one of which is read from end to end at {speed}:",
        "",
    ]
    lines += header("layout", "ranks", "seconds", "host's memory over the share")
    for layout, told in run["layouts"].items():
        ranks = told["ranks"]
        seconds, peak = (max(r[key] for r in ranks) for key in ("seconds", "peak_over_share"))
        lines.append(row(NAMES[layout], len(ranks), f"{seconds:.1f}", f"{peak:.0%}"))
    return lines


def readers() -> list[str]:
    """Seconds by the way in which the loader reads, all in one call."""
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    ((_, run),) = files("loading_readers")
    for entry in run["runs"]:
        times = found.setdefault((entry["reader"], entry["threads"], entry["buffer_MB"]), {})
        times[entry["layout"]] = max(r["seconds"] for r in entry["each_rank"])
    lines = header("reader", *(NAMES[layout] for layout in NAMES))
    for (reader, threads, size), times in found.items():
        name = f"{reader}, {threads} thread{'s' * (threads > 1)}, {size} MB at a time" if threads else reader
        lines.append(row(name, *(f"{times[layout]:.1f}" if layout in times else "-" for layout in NAMES)))
    return lines


def reduction() -> list[str]:
    """Microseconds of the sum over ranks with residual and norm, in a graph and called, beside NCCL."""
    lines: list[str] = []
    for file, run in files("sum_norm"):
        times = {entry["rows"]: entry for entry in run["times"]}
        lines += [f"{about(file, run)}:", "", *header("rows", *times)]
        for name, key in (("ours", "symmetric"), ("NCCL and the norm behind it", "nccl")):
            lines.append(row(f"{name}, in a graph", *(f"{t[f'{key}_graph_us']:.1f}" for t in times.values())))
            lines.append(row(f"{name}, called", *(f"{t[f'{key}_us']:.0f}" for t in times.values())))
        lines.append("")
    return lines[:-1]
