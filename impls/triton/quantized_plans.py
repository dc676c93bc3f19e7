"""How the quantised experts are run: tables of tuned tiles under tuned/quantized/, and rules where there is none.

A table holds the shape, the format and whether activations become codes, and per number of tokens a plan.  Lookup: the
same format and treatment of activations, a device of the same compute capability, the nearest shape within `NEAR`, of
equally near ones that of the same card, then the plan whose rows per expert are nearest.  One that goes slot by slot is
taken for no more rows than it was timed at: with them grows what it does, and what is aligned reads an expert once.
`tune_quantized` writes them.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_harness.impls.triton._quantized_operands import PACKED
from moe_harness.impls.triton.configs import NEAR, TUNED, WALKED, Shape, Tiling, device_name

__all__ = ["Plan", "file_of", "plan_from", "plan_of", "rules", "tables"]

FOLDER = TUNED / "quantized"


@dataclass(frozen=True)
class Plan:
    """How to run the experts of one format at one number of rows per expert.

    Tiles are computed transposed, so n is the long side: 64 rows of weights and more are what a warpgroup multiplies.
    A step is the run of columns under one scale where the format has one, so k counts for the others alone.

    `few`: each slot is a product of its own, in the tensor cores as a tile of m rows of which one counts, or, where m
    is 1, without them: n columns a program, k pieces of 16 bytes of a row in one turn.  `ahead`: activations that
    become codes do so before the products, and not in every program that reads them.  Where the slots are aligned the
    tiles of the first product are then 128 columns wide, as it gives codes; otherwise its m is more than 1.  For codes
    of four bits, behind an alignment alone: activations are woven before the products.
    """

    few: bool
    ahead: bool
    gate_up: Tiling
    down: Tiling


def plan_from(data: dict[str, Any]) -> Plan:
    """Plan from its JSON object."""
    return Plan(data["few"], data["ahead"], Tiling(**data["gate_up"]), Tiling(**data["down"]))


@dataclass(frozen=True)
class Table:
    """A tuned file: plans by number of tokens of one shape."""

    device: str
    shape: Shape
    plans: tuple[tuple[int, Plan], ...]


def file_of(device: torch.device, shape: Shape, format: str, quantize: bool) -> Path:
    """Where the table of a shape belongs."""
    kind = f"{format}_codes" if quantize else format
    sizes = f"E{shape.experts}_H{shape.hidden}_I{shape.width}_k{shape.top_k}"
    return FOLDER / f"{device_name(device)}.{kind}.{sizes}.json"


@functools.cache
def tables(format: str, quantize: bool, capability: tuple[int, int]) -> tuple[Table, ...]:
    """The tables of a format for devices of a compute capability."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        data = json.loads(path.read_text())
        if (data["format"], data["quantize"], tuple(data["capability"])) == (format, quantize, capability):
            plans = tuple(sorted((int(tokens), plan_from(plan)) for tokens, plan in data["entries"].items()))
            found.append(Table(path.name.partition(".")[0], Shape(**data["shape"]), plans))
    return tuple(found)


@functools.cache
def plan_of(shape: Shape, format: str, slots: int, quantize: bool, device: torch.device) -> Plan:
    """The plan for `slots` slots that are expected to have a local expert."""
    if device.type != "cuda":
        return _interpreted(shape, format, slots, quantize)
    capability, name = torch.cuda.get_device_capability(device), device_name(device)
    near = [(shape.distance(t.shape), t.device != name, t) for t in tables(format, quantize, capability) if t.plans]
    near = sorted((n for n in near if n[0] <= NEAR), key=lambda n: n[:2])
    if not near:
        return rules(shape, format, slots, quantize)
    known = near[0][2].shape
    rows = slots / shape.experts
    timed = [(tokens * known.top_k / known.experts, plan) for tokens, plan in near[0][2].plans]
    within = [(at, plan) for at, plan in timed if rows <= at or not plan.few]
    return min(within or timed, key=lambda p: abs(math.log2(p[0] / rows)))[1]


def rules(shape: Shape, format: str, slots: int, quantize: bool) -> Plan:
    """By rows per expert, for shapes and devices without a table."""
    rows = slots / shape.experts
    ahead = quantize or (format in PACKED and shape.element_size == 2)
    large = 3 * shape.hidden * shape.width > 2**24  # codes of an expert: a program has time to fill its stages
    if slots <= WALKED and shape.element_size == 2 and format != "plain" and (quantize or format in PACKED or large):
        tile = Tiling(16, 64, 128, warps=4, stages=4)
        return Plan(True, quantize, tile, tile)
    if slots <= WALKED:
        width = shape.element_size if format == "plain" else 1
        return Plan(True, False, _walk(4 // width), _walk(8 // width))
    if shape.element_size == 4:  # no tensor cores but for codes: small tiles keep the products in registers
        tiling = Tiling(16, 64 if quantize else 32, 32, warps=4, stages=2, tma=False)
        return Plan(False, False, tiling, tiling)
    step = 64 if format == "plain" else 128
    if rows <= 24:  # bytes: few rows of activations, many loads in flight
        tiling = Tiling(16 if rows <= 12 else 32, 64, step, warps=4, stages=4, copier=quantize)
        # In every program the codes were made 24 times over: 903 us at 256 tokens of Qwen3-30B-A3B, 282 without codes.
        return Plan(False, ahead, replace(tiling, n=128) if quantize else tiling, tiling)
    first = Tiling(64, 128, step, warps=8, stages=3, waves=1, copier=quantize)  # two sums of 64 x 128 a program
    second = Tiling(64 if rows <= 96 else 128, 128, step, warps=8, stages=3, waves=1, copier=quantize)
    return Plan(False, ahead, first, second)


def _walk(n: int) -> Tiling:
    """Of few slots: n columns a program, all of a row of up to 2 KiB at once."""
    return Tiling(1, n, 128, warps=4)


def _interpreted(shape: Shape, format: str, slots: int, quantize: bool) -> Plan:
    """Small tiles; under the interpreter every path is met on small data."""
    if slots <= 2:
        return Plan(True, False, _walk(64), _walk(64))
    tiling = Tiling(16, 64, 64, waves=1, tma=False)
    if slots <= 4:
        return Plan(True, quantize and slots == 4, tiling, tiling)
    rows = 64.0 if slots > 24 else slots / shape.experts
    ahead = quantize and rows > 24
    if format in PACKED and rows > 24:
        tiling = replace(tiling, m=64 if slots > 48 else 16, k=128)
        return Plan(False, True, tiling, tiling)
    return Plan(False, ahead, replace(tiling, n=128) if ahead else tiling, tiling)


def as_json(plan: Plan) -> dict[str, Any]:
    """JSON object of a plan."""
    return asdict(plan)
