"""Tile sizes as data: one JSON file per device and shape under tuned/, rules fill the gaps.

A file holds the shape it was tuned for and, per number of tokens, how to run: the walk for few tokens, or the tilings
of the two products.  Lookup: same compute capability, same element size, the nearest shape by the sum of |log2| ratios
of (E, H, I, k) within NEAR, of equally near ones that of the same card, then the entry whose rows per expert are
nearest.  Otherwise the generic rules below.

One card's table serves another of its capability: of the H200's entries for Qwen3-30B-A3B, which has 1.4 times the
bandwidth, 18 of 20 were within 2 % of the best ones on an H100 (the others 11 and 18 % off).
"""

import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from moe_harness.impls.triton._common import programs_at_once

__all__ = [
    "Entry",
    "Shape",
    "Tiling",
    "Walk",
    "choose",
    "entry_from",
    "entry_to",
    "generic",
    "grid_size",
    "tuned_files",
]

TUNED = Path(__file__).parent / "tuned"
WALKED = 16  # slots up to which the generic rules take the few-token path
NEAR = 2.0  # doublings: beyond a factor of four in all dimensions together another shape's tiles are no guide


@dataclass(frozen=True)
class Shape:
    """What a configuration is looked up by: local experts, hidden size, intermediate size, slots per token, bytes."""

    experts: int
    hidden: int
    width: int
    top_k: int
    element_size: int = 2

    def distance(self, other: "Shape") -> float:
        """Doublings between two shapes, infinite across element sizes."""
        if self.element_size != other.element_size:
            return math.inf
        pairs = zip(tuple(asdict(self).values())[:4], tuple(asdict(other).values())[:4], strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class Tiling:
    """One grouped product: tile m x n, step k, row tiles walked per column, warps, pipeline stages.

    `waves`: the grid in programs per multiprocessor (0: one program per possible tile).  `tma`: read tiles through the
    copy engine where the layout allows.  `swap`: compute the tile transposed, weights first.  `flat`: make one loop of
    the loops over tiles and over k, so that the next tile is being read while this one is written.  `tail`: give the
    last rows of an expert a tile of half the height where they fit.  `extra`: let the last tile of an expert have up to
    that many rows more, so that its weights are read once for both (first product only).  `by_expert`: a program takes
    all rows of one expert, and finds its tile with one load.  `copier`: where the device is a Hopper GPU and the layout
    allows, the kernel in which some warps copy and the others multiply, in tiles of up to 192 rows by 256 rows of the
    weights; the other fields but `group` are for everywhere else.  `registers`: the most a thread may hold, so that
    more programs run at once (0: as many as the compiler takes); of the quantised experts alone.
    """

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 4
    stages: int = 3
    waves: int = 0
    tma: bool = True
    swap: bool = False
    flat: bool = False
    tail: bool = False
    extra: int = 0
    by_expert: bool = False
    copier: bool = False
    registers: int = 0


@dataclass(frozen=True)
class Walk:
    """The few-token path: columns, step, warps and pipeline stages of its two kernels."""

    up_n: int = 32
    up_k: int = 128
    up_warps: int = 4
    up_stages: int = 3
    down_n: int = 64
    down_k: int = 128
    down_warps: int = 4
    down_stages: int = 3


@dataclass(frozen=True)
class Entry:
    """How to run one number of tokens: `walk`, or the two tilings."""

    walk: Walk | None = None
    gate_up: Tiling | None = None
    down: Tiling | None = None

    def products(self) -> tuple[Tiling, Tiling]:
        """The tilings of both products; ValueError where only a walk is held."""
        if self.gate_up is None or self.down is None:
            raise ValueError(f"{self} should hold the tilings of both products")
        return self.gate_up, self.down


def grid_size(tiling: Tiling, slots: int, experts: int, columns: int, device: torch.device, runs: bool = True) -> int:
    """Programs to launch for `slots` routed rows as expected; a program takes further tiles if there are more.

    Row tiles are at most one per slot, and at most one more per expert than full ones.  With `by_expert` (where the
    `runs` of the experts are known) there is one program per expert and column block.
    """
    if tiling.by_expert and runs:
        return experts * triton.cdiv(columns, tiling.n)
    tiles = max(1, min(slots, experts + slots // tiling.m)) * triton.cdiv(columns, tiling.n)
    return min(tiles, tiling.waves * programs_at_once(device)) if tiling.waves else tiles


def entry_from(data: dict) -> Entry:
    """Entry from its JSON object."""
    kinds = {"walk": Walk, "gate_up": Tiling, "down": Tiling}
    return Entry(**{name: kinds[name](**value) for name, value in data.items()})


def entry_to(entry: Entry) -> dict:
    """JSON object of an entry, without what it does not use."""
    return {name: value for name, value in asdict(entry).items() if value is not None}


def device_name(device: torch.device) -> str:
    """Name of the device as used in file names."""
    return torch.cuda.get_device_name(device).replace(" ", "_") if device.type == "cuda" else "cpu"


Tuned = tuple[tuple[Shape, tuple[tuple[int, Entry], ...]], ...]  # (shape, ((tokens, entry), ...)) of each file


@functools.cache
def tuned_files(name: str, capability: tuple[int, int] | None = None) -> Tuned:
    """The tuned files of device `name`, and behind them those of other devices of that compute capability."""
    own, others = [], []
    for path in sorted(TUNED.glob("*.json")):
        data = json.loads(path.read_text())
        entries = tuple(sorted((int(tokens), entry_from(e)) for tokens, e in data["entries"].items()))
        if path.name.startswith(f"{name}."):
            own.append((Shape(**data["shape"]), entries))
        elif capability is not None and list(capability) == data["capability"]:
            others.append((Shape(**data["shape"]), entries))
    return (*own, *others)


def files_for(device: torch.device) -> Tuned:
    """The tuned files that say something about a CUDA device, its own first."""
    return tuned_files(device_name(device), torch.cuda.get_device_capability(device))


def generic(shape: Shape, slots: int) -> Entry:
    """Rules for a shape or device without a tuned file: the row tile follows the rows per expert."""
    if slots <= WALKED:
        return Entry(walk=Walk() if shape.element_size == 2 else Walk(up_k=32, up_stages=2, down_k=32, down_stages=2))
    if shape.element_size == 4:  # fp32 products do not use the tensor cores: small tiles keep them in registers
        tiling = Tiling(16 if slots < 32 * shape.experts else 32, 64, 32, warps=4, stages=2, tma=False)
        return Entry(gate_up=tiling, down=tiling)
    rows = slots / shape.experts
    if rows <= 24:
        tiling = Tiling(16 if rows <= 12 else 32, 64, 128, warps=4, stages=3)
    elif rows <= 96:
        tiling = Tiling(64, 128, 64, warps=4, stages=3)
    else:
        tiling = Tiling(128, 128, 64, warps=8, stages=3, waves=1, copier=True)
    return Entry(gate_up=tiling, down=tiling)


def small(slots: int) -> Entry:
    """Tiles for the interpreter, where time goes with the number of operations and not their size."""
    if slots <= 4:
        return Entry(walk=Walk(up_n=16, up_k=32, down_n=16, down_k=32))
    tiling = Tiling(16, 32, 32, waves=1, tma=False)
    return Entry(gate_up=tiling, down=tiling)


@functools.cache
def choose(shape: Shape, slots: int, device: torch.device) -> Entry:
    """The entry to run for `slots` slots that are expected to have a local expert.

    Nearest tuned shape, then nearest number of rows per expert; else the generic rules.
    """
    if device.type != "cuda":
        return small(slots)
    near = [(shape.distance(known), known, entries) for known, entries in files_for(device)]
    near = sorted((n for n in near if n[0] <= NEAR and n[2]), key=lambda n: n[0])
    if not near:
        return generic(shape, slots)
    _, known, entries = near[0]
    return min(entries, key=lambda e: abs(math.log2(e[0] * known.top_k / known.experts * shape.experts / slots)))[1]


@functools.cache
def choose_linear(shape: Shape, rows: int, device: torch.device) -> Tiling:
    """Tiling of the grouped linear alone: the experts' second product at the nearest number of rows per expert.

    `shape.hidden` is the depth K and `shape.width` the columns N, so H of a tuned file is N and its I is K.
    """
    if device.type != "cuda":
        return small(1024).products()[1]
    near = []
    for known, entries in files_for(device):
        seen = Shape(shape.experts, shape.width, shape.hidden, known.top_k, shape.element_size)
        near += [(seen.distance(known), known, t, e.down) for t, e in entries if e.down is not None]
    near = [n for n in near if n[0] <= NEAR]
    if not near:
        return generic(shape, max(rows, WALKED + 1)).products()[1]
    closest = min(n[0] for n in near)
    wanted = rows / shape.experts

    def gap(n: tuple[float, Shape, int, Tiling]) -> float:
        return abs(math.log2(n[2] * n[1].top_k / n[1].experts / wanted))

    return min((n for n in near if n[0] == closest), key=gap)[3]
