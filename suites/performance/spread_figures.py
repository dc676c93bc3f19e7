"""The page's figures of a whole model over GPUs, from the files of over_ranks.py and sum_norm.py.

A file's name says how many GPUs it is of; every number of them that was run has tables of its own.
"""

import json
import re
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


def over_ranks() -> list[str]:
    """Milliseconds of a decoding step by layout and dispatcher, and how many times one GPU's speed that is."""
    lines: list[str] = []
    for file, run in files("over_ranks"):
        one = run["ways"]["one"]["batches"]
        batches = list(one)
        contexts = ", ".join(str(run["contexts"][batch]) for batch in batches)
        lines += [f"{about(file, run)}, {run['layers']} layers; sequences with {contexts} keys each:", ""]
        lines += header("sequences", *batches)
        for way, told in run["ways"].items():
            cells = [_cell(told["batches"].get(batch), one[batch]) for batch in batches]
            lines.append(row(told_of(way) + ("" if told["graphs"] else ", no graph"), *cells))
        lines.append("")
    return lines[:-1]


def _cell(entry: dict[str, float] | None, one: dict[str, float]) -> str:
    if entry is None:
        return "-"
    return f"{entry['engine_us'] / 1e3:.2f} ({one['engine_us'] / entry['engine_us']:.2f})"


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
