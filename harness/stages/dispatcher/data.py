"""From a dispatcher case to the tensors of all ranks, exact in their dtype, and the experts they are run through.

Hidden states and routing weights are integers (in fp32 with a fraction, so that rounding to 16 bits would show) small
enough that every product and every sum is exact in the dtype of the case, in any order; in bf16 they are multiples of a
unit with which most are beyond the range of fp16.  Six columns spell the number
of the token in base 7, so that a received row tells which token of which rank it is.

    f_e(x) = sign_e * x[permutation_e] + constant_e        distinct for each expert, not symmetric in the columns
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.ranked_cases import unit_of
from moe_harness.harness.stages.dispatcher.cases import DispatcherCase
from moe_harness.reference.dispatcher import Batch

# Integers up to here are exact.  In fp32 the hidden states take 12 bits of the 24, so that half of them do not survive
# fp16, and the weights what is left behind the point.
EXACT = {"fp16": 2**11, "bf16": 2**8}
LARGEST_FP32 = 4095
TAG_COLUMNS = 6
UNITS = {DTYPES[name]: unit_of(name) for name in EXACT}
_EXPERT_FIELDS = ("owner", "logical", "signs", "permutations", "constants")


@dataclass(frozen=True)
class World:
    """What all ranks hold together."""

    batches: list[Batch]  # one per rank, on the CPU
    owner: Tensor  # [P], of each physical expert
    logical: Tensor  # [P], the expert that it holds; 0..E-1 where there are no copies
    columns: Tensor  # [H], true where this rank's group computes an expert's output
    signs: Tensor  # [E, H]
    permutations: Tensor  # [E, H]
    constants: Tensor  # [E, H]

    def with_experts_of(self, other: "World") -> "World":
        """These tokens, the experts and their owners of `other`."""
        return replace(self, **{name: getattr(other, name) for name in _EXPERT_FIELDS})

    @property
    def has_copies(self) -> bool:
        return len(self.logical) > len(self.signs)

    def expert(self, expert: int, rows: Tensor) -> Tensor:
        """What this rank's group computes of f_e of rows [n, H], in their dtype: columns of others are 0."""
        rows = rows[:, self.permutations[expert]]
        out = self.signs[expert].to(rows.dtype) * rows + self.constants[expert].to(rows.dtype)
        return torch.where(self.columns, out, torch.zeros_like(out))


def build(case: DispatcherCase, *, replicated: bool = False, values: int = 0, group: int = 0) -> World:
    """Tensors of every rank from the spec alone.

    Args:
        replicated: every rank has the tokens of the longest.
        group: of the case's groups, the one whose share of every expert is computed.
        values: other numbers draw other hidden states and weights for the very same ids, sizes and experts.
    """
    random = torch.Generator().manual_seed(case.seed * 7919 + case.E * 101 + case.R)
    counts = [max(case.tokens)] if replicated else case.tokens
    total = sum(counts)
    hidden, weights = _hidden(case, total, random), _weights(case, total, random)
    ids = _ids(case, total, random)
    if values:
        others = torch.Generator().manual_seed(case.seed * 7919 + values)
        hidden, weights = _hidden(case, total, others), _weights(case, total, others)
    weights = weights.masked_fill(ids < 0, torch.nan)  # a masked slot's weight must not matter
    batches = [Batch(*parts) for parts in zip(*(t.split(counts) for t in (hidden, weights, ids)), strict=True)]
    shape = (case.E, case.H)
    owner = _owner(case, random)
    return World(
        batches * case.members if replicated else batches,
        owner,
        _logical(case, random),
        torch.arange(case.H) % case.groups == group,
        torch.randint(0, 2, shape, generator=random) * 2 - 1,
        torch.stack([torch.randperm(case.H, generator=random) for _ in range(case.E)]),
        torch.randint(-1, 2, shape, generator=random) * unit_of(case.dtype),
    )


def _hidden(case: DispatcherCase, total: int, random: torch.Generator) -> Tensor:
    largest = largest_hidden(case)
    hidden = torch.randint(-largest, largest + 1, (total, case.H), generator=random)
    hidden[:, :TAG_COLUMNS] = tags(total)
    hidden = hidden.to(DTYPES[case.dtype]) * unit_of(case.dtype)
    if case.ids == "nan" and total:
        hidden[total // 2, -1] = torch.nan  # one token of one rank; no other row may change
    return hidden


def largest_hidden(case: DispatcherCase) -> int:
    """Largest |x|: sums of k slots reach (|x| + 1) * (1 + ... + k)."""
    return LARGEST_FP32 if case.dtype == "fp32" else EXACT[case.dtype] // (case.k * (case.k + 1) // 2) - 1


def tags(total: int) -> Tensor:
    """Digits -3..3 of each token's number, [total, 6]."""
    return torch.arange(total)[:, None] // 7 ** torch.arange(TAG_COLUMNS) % 7 - 3


def tagged_token(row: Tensor) -> int:
    """The number that a row's tag spells; -1 where it spells none."""
    digits = row[:TAG_COLUMNS].double() / UNITS.get(row.dtype, 1.0) + 3
    if not bool(((digits >= 0) & (digits <= 6) & (digits == digits.round())).all()):
        return -1
    return int((digits.long() * 7 ** torch.arange(TAG_COLUMNS)).sum())


def _weights(case: DispatcherCase, total: int, random: torch.Generator) -> Tensor:
    """1..k in an order of its own for each token, so that no two slots of a token weigh the same."""
    order = torch.rand(total, case.k, generator=random).argsort(1) + 1.0
    if case.dtype != "fp32":
        return order
    # As many bits behind the point as leave the largest sum exact: 11 for k = 1, 5 for k = 10.
    unit = 2 ** (24 - math.ceil(math.log2((LARGEST_FP32 + 1) * case.k * (case.k + 3) / 2)))
    return order + (torch.randint(0, unit // 2, order.shape, generator=random) * 2 + 1) / unit


def _ids(case: DispatcherCase, total: int, random: torch.Generator) -> Tensor:
    ids = torch.rand(total, case.E, generator=random).argsort(1)[:, : case.k]
    if case.ids == "none":
        return torch.full_like(ids, -1)
    if case.ids == "hot":
        ids[:, 0] = case.E - 1
        ids[:, 1:] = torch.where(ids[:, 1:] == case.E - 1, -1, ids[:, 1:])
    if case.ids == "duplicates":
        ids[:, -1] = ids[:, 0]
    if case.ids == "masked":
        ids[torch.rand(ids.shape, generator=random) < 0.4] = -1
    return ids.contiguous()


def _owner(case: DispatcherCase, random: torch.Generator) -> Tensor:
    experts, ranks = torch.arange(case.E + case.copies), case.members
    if case.owner == "block":  # the first ranks hold one more where E does not divide
        return torch.tensor([r for r in range(ranks) for _ in range(len(range(r, len(experts), ranks)))])
    if case.owner == "cyclic":
        return experts % ranks
    if case.owner == "last_empty":
        return experts % max(ranks - 1, 1)
    if case.owner == "one":
        return torch.full_like(experts, ranks // 2)
    return torch.randint(0, ranks, (len(experts),), generator=random)


def _logical(case: DispatcherCase, random: torch.Generator) -> Tensor:
    """Which expert each physical one holds: every expert once, the others drawn, in no order."""
    if not case.copies:
        return torch.arange(case.E)
    drawn = torch.randint(0, case.E, (case.copies,), generator=random)
    return torch.cat([torch.arange(case.E), drawn])[torch.randperm(case.E + case.copies, generator=random)]
