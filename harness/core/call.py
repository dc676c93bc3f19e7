"""A call of an implementation, built from a case: operands in fenced buffers, and keyword arguments."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import Declarations
from moe_harness.harness.core.memory import Arena

INTS = {"int64": torch.int64, "int32": torch.int32}
PERIOD = 99991  # prime, so that no two experts see the same run of the repeated base
LARGE = 1 << 24  # values; more of them are repeated, since 2^31 drawn one by one take a minute and 17 GB


@dataclass
class Call:
    """Positional arguments by name, keyword arguments, and the arena that fences their memory in."""

    case: Case
    args: dict[str, Any]
    keywords: dict[str, Any]
    arena: Arena = field(default_factory=Arena)
    truth: Any = None  # what a right result is, where that is known already; void once the operands change
    declared: Declarations | None = None  # what the implementation that gets it says of itself

    def like(self, args: dict[str, Any], keywords: dict[str, Any]) -> "Call":
        """A call of the same case and implementation with other operands; what is right for it is not known yet."""
        return Call(self.case, args, keywords, declared=self.declared)

    def operand(self, name: str) -> Any:
        """The argument of that name, positional or keyword."""
        return self.args[name] if name in self.args else self.keywords[name]


class Builder:
    """Draws the tensors of a case, on the CPU so that every device gets the same bits, and places them."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed + 1)
        self.dtype = DTYPES[case.dtype]
        self.arena = Arena()
        self._layout_of, _, self._layout = case.layout.partition(":")

    def place(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`values` as operand `name`, laid out as the case says."""
        kind = self._layout if self._layout_of in (name, "all") else "contiguous"
        return self.arena.place(name, values.to(self.device, dtype or self.dtype), kind)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def large_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values repeated with a prime period: drawing 10^7 values would cost more than judging them."""
        size = torch.Size(shape).numel()
        if size <= PERIOD:
            return self.normal(*shape, scale=scale)
        return _repeated(self.normal(PERIOD, scale=scale).to(self.dtype), shape)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """Integers in [low, high), as int64, or very many of them as int8 (a range within -128..127 then)."""
        if torch.Size(shape).numel() <= LARGE:
            return torch.randint(low, high, shape, generator=self.generator)
        return _repeated(self.integers(low, high, (PERIOD,)).to(torch.int8), shape)

    def signs(self, *shape: int) -> Tensor:
        """1 and -1 in fp32, or very many of them in the dtype of the case."""
        if torch.Size(shape).numel() <= LARGE:
            return self.integers(0, 2, shape) * 2.0 - 1.0
        return _repeated(self.signs(PERIOD).to(self.dtype), shape)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def distinct(self, rows: int, population: int, count: int) -> Tensor:
        """[rows, count] ids, distinct in each row."""
        if rows * population > 1 << 24:  # a random start and the ids after it instead of a sort of every row
            start = self.integers(0, population, (rows, 1))
            return (start + torch.arange(count)) % population
        return (
            self.uniform(rows, population).topk(count, dim=-1).indices
            if rows
            else torch.empty(0, count, dtype=torch.int64)
        )


def _repeated(base: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values one after the other, from the start again where they end."""
    size = torch.Size(shape).numel()
    return base.repeat(-(-size // len(base)))[:size].view(shape)
