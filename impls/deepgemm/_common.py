"""DeepGEMM's grouped products of rows that lie one expert behind the other, each expert's padded to whole tiles.

`m_indices` int32 [M] tells the expert of every row, -1 that of padding, which is left as it is.  Read in 2.0.0 and
2.8.0, which can take where experts end instead; a later one does so unless told otherwise.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed

INSTALL = "pip install git+https://github.com/deepseek-ai/DeepGEMM"


class Padded(NamedTuple):
    """Where rows that are sorted by expert go."""

    to: Tensor  # of each row, its place among the padded ones, int64 [S]
    m_indices: Tensor  # int32 [M]


def of(attribute: str) -> Any:
    return needed("deep_gemm", attribute, INSTALL)


def padded(sizes: Tensor) -> Padded:
    """For rows in runs of `sizes` [E]; it asks the device how many there are."""
    tile = int(of("get_m_alignment_for_contiguous_layout")())
    room = (sizes + tile - 1) // tile * tile
    starts = room.cumsum(0) - room
    expert = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    first = sizes.cumsum(0) - sizes
    to = starts[expert] + torch.arange(len(expert), device=sizes.device) - first[expert]
    m_indices = torch.full((int(room.sum()),), -1, dtype=torch.int32, device=sizes.device)
    m_indices[to] = expert.int()
    return Padded(to, m_indices)


def spread(rows: Tensor, layout: Padded) -> Tensor:
    """rows [S, ...] in their places, zeros between them, [M, ...]."""
    out = rows.new_zeros(len(layout.m_indices), *rows.shape[1:])
    out[layout.to] = rows
    return out


def multiply(function: str, *operands: Any, **options: Any) -> None:
    """A grouped product with an expert for each row.  Its binding writes the names of arguments into the docstring."""
    product = of(function)
    if "use_psum_layout" in (product.__doc__ or ""):
        options["use_psum_layout"] = False
    product(*operands, **options)
