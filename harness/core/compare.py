"""A result against its bound: the largest |z|, and the rms of z over everything, rows, columns, groups and tiles.

Both statistics are needed: a lost column shows in the first, a weight off by one per cent only in the second.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from moe_harness.harness.core.bounds import Bound, independent, matrix, max_limit, rms_limit
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.error_patterns import Places, heatmap, structure
from moe_harness.harness.core.findings import HISTOGRAM_EDGES, Finding, Record

TILE = (16, 64)


class PlainRows:
    """Names the rows of what is no stage's first output: a relation, a cache."""

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return {"row": row, "column": column}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        return {}


def judged(stage: Places, call: Call, truth: Bound | Tensor, result: Tensor) -> Record:
    """Judge one output against what it may be: a bound, or the only right value."""
    if isinstance(truth, Tensor):
        return exactly(stage, call, truth, result)
    return against_bound(stage, call, truth, result)


def against_bound(stage: Places, call: Call, bound: Bound, result: Tensor) -> Record:
    """Judge `result` elementwise and by its rms.  Elements whose value is NaN or infinite are judged by kind alone."""
    flat, out = bound.flat(), matrix(result)
    value = flat.value
    record = Record(elements=value.numel())
    if not value.numel():
        return record
    finite = value.isfinite() & flat.variance.isfinite()
    swallowed = value.isnan() & ~out.isnan() & _is_nan_certain(call, value)
    if bool(swallowed.any()):
        record.add(
            _located(stage, call, swallowed, "is {got}, but a NaN in the inputs reaches this element", flat, out)
        )
    lost = value.isinf() & ~out.isnan() & (out.double() != value) & _is_infinity_certain(call, value)
    if bool(lost.any()):
        record.add(_located(stage, call, lost, "is {got}, but should be {want}: one product is infinite", flat, out))
    z = torch.where(finite, flat.z(out), 0.0)
    z = torch.where(finite & ~out.isfinite(), torch.inf, z).abs()
    _add_histogram(record, z[finite])
    _judge_largest(stage, call, flat, out, z, record)
    if not record.findings and bool(finite.all()):
        _judge_rms(stage, call, flat, out, z, record)
    return record


def exactly(stage: Places, call: Call, value: Tensor, result: Tensor) -> Record:
    """Judge `result` bitwise (a zero of either sign is a zero)."""
    value, out = matrix(value).double(), matrix(result.double())
    record = Record(elements=value.numel())
    wrong = out != value
    if bool(wrong.any()):
        message = "is {got}, but should be exactly {want}; on these data every rounding is exact"
        flat = Bound(value, torch.zeros_like(value), torch.zeros_like(value), torch.zeros(len(value), 2))
        finding = _located(stage, call, wrong, message, flat, out)
        finding.headroom = float("inf")
        record.add(finding)
    return record


def _is_nan_certain(call: Call, value: Tensor) -> Tensor:
    """Where a NaN (not an infinity) among the inputs makes the value NaN, whatever way it is computed."""
    return torch.full_like(value, call.case.data.endswith("nan"), dtype=torch.bool)


def _is_infinity_certain(call: Call, value: Tensor) -> Tensor:
    """Where one infinite product among finite ones makes the value infinite, in whatever order they are summed.

    Sums that carry a correction (Kahan's, or operands split into halves) give inf - inf = NaN there, and may.
    """
    return torch.full_like(value, call.case.data == "down_inf", dtype=torch.bool)


def _add_histogram(record: Record, z: Tensor) -> None:
    bins = (z.clamp(max=HISTOGRAM_EDGES[-1]) * 4).floor().long().clamp(max=len(HISTOGRAM_EDGES) - 1)
    counts = torch.bincount(bins, minlength=len(HISTOGRAM_EDGES))
    record.histogram = [a + b for a, b in zip(record.histogram, counts.tolist(), strict=True)]


def _judge_largest(stage: Places, call: Call, bound: Bound, out: Tensor, z: Tensor, record: Record) -> None:
    limit = max_limit()
    largest = float(z.max())
    record.worst = max(record.worst, largest / limit)
    if largest <= limit:
        return
    message = "is {got}, but should be {want} within {sigma}: {z} sigma away, limit " + f"{limit:.1f}"
    finding = _located(stage, call, z > limit, message, bound, out, z)
    finding.headroom = largest / limit
    record.add(finding)


def _located(
    stage: Places, call: Call, wrong: Tensor, message: str, bound: Bound, out: Tensor, z: Tensor | None = None
) -> Finding:
    """A finding at the worst element, with what the pattern of wrong elements looks like."""
    error = (out.double() - bound.value).abs().nan_to_num(nan=torch.inf)
    score = torch.where(wrong, (error if z is None else z.nan_to_num(nan=torch.inf)), -1.0)
    row, column = divmod(int(score.argmax()), out.shape[-1])
    got, want = _apart(float(out[row, column]), float(bound.value[row, column]))
    sigma = f"{float(bound.variance[row, column]) ** 0.5:.3g}"
    told = message.format(got=got, want=want, sigma=sigma, z="" if z is None else f"{float(z[row, column]):.3g}")
    count = int(wrong.sum())
    return Finding(
        f"element [{row}, {column}] {told} ({count} of {wrong.numel()} elements are wrong)",
        where=stage.place_of(call, row, column),
        looks_like=structure(stage, call, bound.value, out, wrong),
        heatmap=heatmap(error, "|error|", None) if z is None else heatmap(z, "|z|", max_limit()),
    )


def _apart(got: float, want: float) -> tuple[str, str]:
    """Both numbers, with as many digits as it takes to see that they differ."""
    return next(
        (pair for digits in (6, 9, 12) if (pair := (f"{got:.{digits}g}", f"{want:.{digits}g}"))[0] != pair[1]),
        (f"{got:.17g}", f"{want:.17g}"),
    )


def _judge_rms(stage: Places, call: Call, bound: Bound, out: Tensor, z: Tensor, record: Record) -> None:
    for name, rms, limit in _statistics(stage, call, bound, z):
        record.worst = max(record.worst, rms / limit)
        if rms > limit:
            message = f"the rms of the error over {name} is {rms:.3g} sigma, but should be under {limit:.3g}"
            pattern = structure(stage, call, bound.value, out, z > 1.0)
            record.add(Finding(message, rms / limit, {"over": name}, pattern, heatmap=heatmap(z, "|z|", max_limit())))
            return


def _statistics(stage: Places, call: Call, bound: Bound, z: Tensor) -> Iterator[tuple[str, float, float]]:
    """(name, rms, limit), the widest groups first."""
    squares = z.square()
    share = (bound.shared / bound.variance).clamp(0, 1)
    own, common = bound.sources[:, 0], bound.sources[:, 1]

    def of(name: str, rows: Any, columns: Any = slice(None)) -> tuple[str, float, float]:
        part = squares[rows][:, columns]
        dof = float(independent(own[rows], part.shape[-1]).sum())
        limit = rms_limit(dof, float(common[rows].sum()), float(share[rows][:, columns].mean()))
        return name, float(part.mean()) ** 0.5, limit

    yield of("all elements", slice(None))
    for name, rows in stage.row_groups(call).items():
        if bool(rows.any()):
            yield of(name, rows)
    yield from _worst_rows_and_columns(squares, of)
    if squares.numel() > 4 * TILE[0] * TILE[1]:
        yield from _tiles(squares, share, own, common)


def _tiles(squares: Tensor, share: Tensor, own: Tensor, common: Tensor) -> Iterator[tuple[str, float, float]]:
    """As `_statistics`, of all tiles at once: one by one, those of 2^31 elements took a GPU over 200 s, now 13."""

    def mean(matrix: Tensor) -> list[list[float]]:
        return avg_pool2d(matrix[None], TILE, ceil_mode=True, count_include_pad=False)[0].tolist()

    def total(per_row: Tensor) -> list[float]:
        return pad(per_row.double(), (0, -len(per_row) % TILE[0])).view(-1, TILE[0]).sum(1).tolist()

    means, shares, shared = mean(squares), mean(share), total(common)
    widths = [min(TILE[1], squares.shape[1] - column) for column in range(0, squares.shape[1], TILE[1])]
    dof = {width: total(independent(own, width)) for width in set(widths)}
    for (i, row), (j, width) in product(enumerate(means), enumerate(widths)):
        limit = rms_limit(dof[width][i], shared[i], shares[i][j])
        yield f"the tile at [{i * TILE[0]}, {j * TILE[1]}]", row[j] ** 0.5, limit


def _worst_rows_and_columns(
    squares: Tensor, of: Callable[..., tuple[str, float, float]]
) -> Iterator[tuple[str, float, float]]:
    """The three rows and columns with the largest rms: the others are under the same limit or a lower statistic."""
    for row in squares.mean(1).topk(min(3, squares.shape[0])).indices.tolist():
        yield of(f"row {row}", slice(row, row + 1))
    for column in squares.mean(0).topk(min(3, squares.shape[1])).indices.tolist():
        yield of(f"column {column}", slice(None), slice(column, column + 1))
