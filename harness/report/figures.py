"""The two figures of the page as plain data for the template: a heat map of the error and a histogram of z.

They are drawn with the standard library alone: a heat map is a PNG of one pixel per cell, which the browser enlarges,
and a histogram is a row of bars.  Both follow the page's width and its light or dark colours.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Colour = tuple[int, int, int, int]
WITHIN: Colour = (58, 122, 196, 150)
BEYOND: tuple[Colour, ...] = ((250, 196, 72, 255), (222, 68, 40, 255), (110, 10, 34, 255))
NOT_A_NUMBER: Colour = (168, 40, 220, 255)
WORST_CELLS = 3


def heatmap(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the template needs to draw a heat map; None where there is nothing to draw."""
    values = (spec or {}).get("values")
    if not spec or not values or not values[0]:
        return None
    top = max((value for row in values for value in row if _is_number(value)), default=1.0)
    shape = spec.get("shape") or [len(values), len(values[0])]
    return {
        "png": png([[colour(value, top) for value in row] for row in values]),
        "rows": spec.get("rows", "rows"),
        "columns": spec.get("columns", "columns"),
        "last": [max(size - 1, 0) for size in shape],
        "height": max(72, min(360, 10 * len(values))),
        "top": top,
        "any_nan": any(not _is_number(value) for row in values for value in row),
        "worst": worst_cells(values),
        "binned": list(shape) != [len(values), len(values[0])],
    }


def colour(value: float | None, top: float) -> Colour:
    """Clear to blue within the bound, so that the page shows through; yellow to dark red, by the logarithm, beyond."""
    if not _is_number(value):
        return NOT_A_NUMBER
    if value <= 1:
        return (*WITHIN[:3], round(WITHIN[3] * max(value, 0.0)))
    share = math.log(value) / math.log(top) if top > 1 else 1.0
    place = min(share, 1.0) * (len(BEYOND) - 1)
    low = min(int(place), len(BEYOND) - 2)
    red, green, blue, alpha = (
        round(a + (b - a) * (place - low)) for a, b in zip(BEYOND[low], BEYOND[low + 1], strict=True)
    )
    return red, green, blue, alpha


def worst_cells(values: Sequence[Sequence[float | None]]) -> list[tuple[int, int, float]]:
    """(row, column, value) of the largest values beyond the bound."""
    cells = [(r, c, v) for r, row in enumerate(values) for c, v in enumerate(row) if _is_number(v) and v > 1]
    return sorted(cells, key=lambda cell: -cell[2])[:WORST_CELLS]


def png(pixels: Sequence[Sequence[Colour]]) -> str:
    """A data URI of an RGBA image."""
    rows = b"".join(b"\0" + bytes(channel for pixel in row for channel in pixel) for row in pixels)
    header = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    body = b"".join(_chunk(kind, data) for kind, data in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def histogram(statistics: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of z on a logarithmic scale, what a normal distribution would give, and the limits; None without counts."""
    spec = statistics.get("z_histogram") or {}
    counts, edges = spec.get("counts") or [], _finite_edges(spec.get("edges") or [])
    total = sum(counts)
    if not total or len(edges) != len(counts) + 1:
        return None
    limit, low, span = spec.get("limit"), edges[0], edges[-1] - edges[0]
    top = math.log1p(max(counts))
    bars = []
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        expected = total * (normal_below(right) - normal_below(left))
        bars.append(
            {
                "left": left,
                "right": right,
                "count": count,
                "expected": expected,
                "width": 100 * (right - left) / span,
                "height": 100 * math.log1p(count) / top,
                "mark": min(100 * math.log1p(expected) / top, 100.0),
                "beyond": limit is not None and (right <= -limit or left >= limit),
            }
        )
    lines = [] if limit is None else [100 * (z - low) / span for z in (-limit, limit)]
    return {
        "bars": bars,
        "lines": [place for place in lines if 0 <= place <= 100],
        "ticks": ticks(low, edges[-1]),
        "limit": limit,
        "elements": statistics.get("elements", total),
        "most": max(counts),
    }


def normal_below(z: float) -> float:
    """Probability that a standard normal value lies below z."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def ticks(low: float, high: float) -> list[tuple[float, float]]:
    """(value, place in per cent) of whole numbers along the axis, at most nine of them."""
    step = max(1, math.ceil((high - low) / 8))
    first = math.ceil(low / step) * step
    return [(z, 100 * (z - low) / (high - low)) for z in range(first, math.floor(high) + 1, step)]


def _finite_edges(edges: Sequence[float | None]) -> list[float]:
    """Open ends (infinite, or null once in JSON) drawn one bin beyond the last finite edge."""
    known = [edge for edge in edges if _is_number(edge)]
    if len(known) < 2:
        return []
    step = known[1] - known[0]
    head = [] if _is_number(edges[0]) else [known[0] - step]
    tail = [] if _is_number(edges[-1]) else [known[-1] + step]
    return [*head, *known, *tail]
