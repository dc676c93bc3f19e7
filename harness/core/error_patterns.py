"""What the pattern of an error looks like: which rows, columns, experts, and how the result relates to the value."""

from math import log2
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call

MOST = 5  # patterns told, best evidence first
CONSTANT = 0.02  # spread of an error over its mean that is one term added everywhere
SMALL = 0.02  # of the values: a larger error is no rounding
FORMATS = {"bf16": 8, "fp16 or tf32": 11}
PIXELS = 64


class Places(Protocol):
    """What names the rows of an output: the module of a stage."""

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]: ...

    def row_groups(self, call: Call) -> dict[str, Tensor]: ...


def structure(stage: Places, call: Call, value: Tensor, out: Tensor, wrong: Tensor) -> list[str]:
    """Sentences about the wrong elements of `out` [rows, columns], most telling first."""
    told = [*_of_values(value, out.double(), wrong), *_of_groups(stage, call, wrong), *_of_places(wrong)]
    return told[:MOST]


def _of_values(value: Tensor, out: Tensor, wrong: Tensor) -> list[str]:
    got, want = out[wrong], value[wrong]
    told = []
    if bool(got.isnan().any()):
        count = int(got.isnan().sum())
        which = "every wrong element is" if count == len(got) else f"{count} of {len(got)} wrong elements are"
        told.append(f"{which} NaN (poison or unwritten memory was read, or a NaN spread)")
    if bool((got == 0).all()):
        told.append("every wrong element is zero: never computed, or masked away")
    elif float(got.abs().nan_to_num(0).max()) > 1e30:
        told.append("values beyond 1e30: uninitialised memory was read")
    if len(got) > 3 and float((got - want).std()) < CONSTANT * abs(float((got - want).mean())):
        return [f"the result is the value plus {float((got - want).mean()):.4g}"]
    ratio = got / want
    ratio = ratio[ratio.isfinite() & (want.abs() > want.abs().mean() * 0.1)]
    if len(ratio) > 3:
        middle = float(ratio.median())
        spread = float((ratio - middle).abs().median())
        if spread < 0.02 * abs(middle) and abs(middle) > 1e-3:
            factor = spread < 0.2 * abs(middle - 1)  # otherwise a mere rounding
            told += [f"the result is the value times {middle:.4g}"] if factor else _small(got, want)
    return told + _permuted(value, out, wrong)


def _small(got: Tensor, want: Tensor) -> list[str]:
    """An error that is a rounding by its size: relative to the values' own, in bits."""
    relative = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    if not 0 < relative < SMALL:
        return []
    bits = round(-log2(relative / 0.42))  # normal values rounded to n bits: an rms of 0.42 * 2^-n, measured
    like = next((f" ({name} has {b})" for name, b in FORMATS.items() if abs(b - bits) <= 1), "")
    return [f"the error is small, {relative:.1g} of the values, as if something were rounded to {bits} bits{like}"]


def _permuted(value: Tensor, out: Tensor, wrong: Tensor) -> list[str]:
    """Whether wrong rows of the result are other rows of the value, or its columns other columns."""
    for axis, name in ((0, "rows"), (1, "columns")):
        a, b = (out, value) if axis == 0 else (out.T, value.T)
        bad = (wrong.any(1 - axis) & (a != 0).any(1)).nonzero()[:, 0]  # zeros are in the place of nothing
        if not len(bad) or len(value) * len(bad) > 1 << 16 or b.shape[1] < (4 if len(bad) > 1 else 16):
            continue
        distance = torch.cdist(a[bad].nan_to_num(1e30), b.nan_to_num(2e30))
        scale = b.norm(dim=1).median()
        nearest = distance.min(1)
        hits = (nearest.values < 0.05 * scale) & (nearest.indices != bad)
        if float(hits.double().mean()) > 0.8:
            pairs = ", ".join(f"{int(i)} holds {int(j)}" for i, j in zip(bad[:4], nearest.indices[:4], strict=False))
            told = f"{name} are permuted" if len(bad) > 1 else f"one of the {name} is another one"
            return [f"{told}: {pairs}{', ...' if len(bad) > 4 else ''}"]
    return []


def _of_groups(stage: Places, call: Call, wrong: Tensor) -> list[str]:
    rows = wrong.any(1)
    if bool(rows.all()) or int(rows.sum()) < 2:  # one row alone is that of each of its experts
        return []
    exact = [name for name, members in stage.row_groups(call).items() if torch.equal(members, rows)]
    return [f"exactly the rows of {', '.join(exact[:3])} are wrong"] if exact else []


def _of_places(wrong: Tensor) -> list[str]:
    told = []
    for axis, name in ((1, "row"), (0, "column")):
        bad = wrong.any(axis).nonzero()[:, 0].tolist()
        total = wrong.shape[1 - axis]
        if len(bad) == total:
            told += [f"all {total} {name}s hold wrong elements"] if total > 1 else []
        elif len(bad) == 1:
            told.append(f"only {name} {bad[0]} of {total} holds wrong elements")
        elif bad and bad == list(range(bad[0], bad[-1] + 1)):
            end = ", up to the last" if bad[-1] == total - 1 else ""
            told.append(f"wrong {name}s are {bad[0]} to {bad[-1]} of {total}{end}")
        elif len(bad) > 2 and len({b - a for a, b in zip(bad, bad[1:], strict=False)}) == 1:
            told.append(f"one {name} in {bad[1] - bad[0]} is wrong, from {bad[0]} on")
        elif bad:
            since = f", none before {bad[0]}" if bad[0] > 7 else ""
            listed = f"{bad[:6]}{' ...' if len(bad) > 6 else ''}"
            told.append(f"{len(bad)} of {total} {name}s hold wrong elements{since}: {listed}")
    return told


def heatmap(error: Tensor, unit: str, limit: float | None) -> dict[str, Any] | None:
    """`error` [rows, columns] pooled by its maximum to at most 64 x 64 cells."""
    rows, columns = error.shape
    tall, wide = -(-rows // PIXELS), -(-columns // PIXELS)
    finite = error.float().nan_to_num(nan=1e9, posinf=1e9).clamp(max=1e9)
    padded = torch.nn.functional.pad(finite, (0, -columns % wide, 0, -rows % tall), value=0.0)
    pooled = torch.nn.functional.max_pool2d(padded[None], (tall, wide))[0]
    values = [[round(v, 3) for v in row] for row in pooled.tolist()]
    return {
        "rows": "rows",
        "columns": "columns",
        "values": values,
        "unit": unit,
        "limit": limit,
        "shape": [rows, columns],
    }
