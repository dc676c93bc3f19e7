"""Every tiling of our decoding attention in turn, for sequences of 200 to 1,500 keys, each checked against fp64.

    python3 suites/performance/decode_attention.py --json FILE [--sequences 8,32,64,96,128,192,256] [--order longest]

Microseconds of one layer, from CUDA graphs over several layers of cache so that nothing is found in L2.  `given` is the
tiling that the call chooses by itself.  Some minutes for 189 tilings at seven sizes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_harness.suites.performance.step_parts import BANDWIDTH, graph_time  # noqa: E402

HEADS, KV_HEADS, WIDTH, PAGE, LAYERS = 32, 4, 128, 32, 8
SHORTEST, LONGEST = 200, 1500
COLUMNS = ("keys of a block", "most splits", "least blocks of a split", "warps", "stages", "us")
WRONG = torch.finfo(torch.bfloat16).eps  # of the norm: a softmax rounded to bf16 is off by less than half of it


class Batch:
    """Queries of so many sequences over random pages of every layer."""

    def __init__(self, sequences: int, order: str):
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(SHORTEST, LONGEST, (sequences,), generator=draw)
        if order == "longest":
            lengths = lengths.sort(descending=True).values
        columns = -(-LONGEST // PAGE)
        pages = sequences * columns
        cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.caches = torch.randn(LAYERS, 2, pages, KV_HEADS, PAGE, WIDTH, **cuda).transpose(3, 4)
        self.tables = torch.randperm(pages, generator=draw).view(sequences, columns).int().cuda()
        self.lengths = lengths.int().cuda()
        self.starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda")
        self.q = torch.randn(sequences, HEADS, WIDTH, **cuda)
        self.floor_us = float(lengths.sum()) * 2 * KV_HEADS * WIDTH * 2 / BANDWIDTH * 1e6

    def expected(self, sequences: int) -> Tensor:
        """fp64 [sequences, HEADS, WIDTH] over the first layer, of the first ones."""
        rows = []
        for s in range(sequences):
            count = int(self.lengths[s])
            held = self.tables[s, : -(-count // PAGE)].long()
            k, v = (
                c[held].flatten(0, 1)[:count].double().repeat_interleave(HEADS // KV_HEADS, 1) for c in self.caches[0]
            )
            score = torch.einsum("hd,lhd->hl", self.q[s].double(), k) * WIDTH**-0.5
            rows.append(torch.einsum("hl,lhd->hd", score.softmax(1), v))
        return torch.stack(rows)


def tilings(rows: int) -> Iterator[Any]:
    from moe_harness.impls.triton.paged_attention import Config

    for (keys, warps), stages in itertools.product(((16, 1), (32, 2), (32, 4)), (3, 4, 6)):
        for splits, least in ((1, 1), *itertools.product((2, 4, 8, 16, 32), (2, 4, 8, 64))):
            yield Config(rows, keys, splits, least, warps, stages)


@torch.inference_mode()
def measured(sequences: int, order: str) -> dict[str, Any]:
    """Of one size: the floor, the tiling in use and all of them, the fastest first."""
    from moe_harness.impls.triton import paged_attention as ours

    batch = Batch(sequences, order)
    wanted = batch.expected(min(sequences, 4))

    def run(config: Any, keys: Tensor, values: Tensor) -> Tensor:
        out = torch.empty_like(batch.q)
        ours._run_decode(
            batch.q, keys, values, batch.tables, batch.starts, batch.lengths, out, scale=WIDTH**-0.5, config=config,
            ahead=False,
        )  # fmt: skip
        return out

    def timed(config: Any) -> list[float]:
        out = run(config, *batch.caches[0])[: len(wanted)].double()
        error = float((out - wanted).norm() / wanted.norm())
        if not error < WRONG:
            raise RuntimeError(f"{config} is off by {error:.2g} of the norm at {sequences} sequences")
        us = graph_time(lambda: [run(config, keys, values) for keys, values in batch.caches]) / LAYERS
        return [*config[1:], round(us, 1)]

    given = ours.decode_config(batch.q, batch.caches[0, 0], batch.tables)
    found = sorted((timed(config) for config in tilings(given.rows)), key=lambda row: row[-1])
    return {"floor_us": round(batch.floor_us, 1), "given": timed(given), "tilings": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sequences", default="8,32,64,96,128,192,256")
    parser.add_argument("--order", choices=("longest", "any"), default="longest", help="of the sequences in the batch")
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "columns": COLUMNS,
        "versions": {"torch": torch.__version__}, "sequences": {},
    }  # fmt: skip
    for sequences in map(int, chosen.sequences.split(",")):
        found["sequences"][sequences] = of_size = measured(sequences, chosen.order)
        chosen.json.write_text(json.dumps(found))
        print(sequences, {name: of_size[name] for name in ("floor_us", "given")}, of_size["tilings"][:5], flush=True)


if __name__ == "__main__":
    main()
