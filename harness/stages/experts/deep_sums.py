r"""Data on which a product is wrong whose sum over its depth is stored in 16 bits on its way, as where it is split.

The exact data of `exact`, whose first and last columns hold besides what cancels:
    gate_up[n, 0] = 2^m, gate_up[n, H - 1] = -2^m        all tokens are 1 in both columns
    down[n, 0] = 2^b,    down[n, I - 1] = -2^b           a token's hidden values of both columns are equal
Everything that may be stored stays as it is.  A sum over some of the columns alone that holds one end and not the other
takes more bits than the dtype has; ordinary data of a few hundred columns hide its rounding behind those of stored
values, and elsewhere in the exact data such sums are small integers.  Codes hold no 2^b: there some columns at either
end of down are 3 and -3, values of every format.

Torch's own products may add the parts of a split depth in 16 bits on a GPU; for these data that is switched off
(`core.stage.whole_sums`).
"""

from torch import Tensor

from moe_harness.harness.stages.experts.cases import ExpertsCase

# (of gate_up, of down), binary: with a gate of 45..51 and an up of +-1, with hidden values of 45..51 times 2^b.
BITS = {"fp32": (12, 6), "fp16": (12, 6), "bf16": (9, 3)}
THREES = {"fp32": 16, "fp16": 16, "bf16": 4}  # columns of codes at either end


def spread(case: ExpertsCase, hidden: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Make exact data of that kind, in place; H and I are at least 4."""
    first, second = BITS[case.dtype]
    hidden[:, [0, 1, -2, -1]] = 1.0
    _put_ends(gate_up, 1, 2.0**first)
    _mirror(case, gate_up, 1)
    _put_ends(down, 1, 2.0**second)


def spread_codes(case: ExpertsCase, gate_up: Tensor, down: Tensor) -> None:
    """The same of the second product alone, with values that every format has; I is at least 64."""
    columns = THREES[case.dtype]
    _mirror(case, gate_up, columns)
    _put_ends(down, columns, 3.0)


def _mirror(case: ExpertsCase, gate_up: Tensor, columns: int) -> None:
    """Make the first and the last hidden values of a token one number, in place."""
    for half in (gate_up[:, : case.I], gate_up[:, case.I :]):
        half[:, :columns] = half[:, -columns:] = half[:, :1].clone()


def _put_ends(weight: Tensor, columns: int, size: float) -> None:
    """`size` and -`size` in the first and the last columns, and what was there further in."""
    weight[..., columns : 2 * columns] += weight[..., :columns]
    weight[..., -2 * columns : -columns] += weight[..., -columns:]
    weight[..., :columns], weight[..., -columns:] = size, -size
