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
from typing import Any, TypeGuard

Colour = tuple[int, int, int, int]
WITHIN: Colour = (58, 122, 196, 150)
BEYOND: tuple[Colour, ...] = ((250, 196, 72, 255), (222, 68, 40, 255), (110, 10, 34, 255))
NOT_A_NUMBER: Colour = (168, 40, 220, 255)
WORST_CELLS = 3
UNCOUNTABLE = 1e9  # what stands for NaN and infinity in a map that was pooled by its maximum


def heatmap(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the template needs to draw a heat map; None where there is nothing to draw.

    With a `limit` the values are told in multiples of it; without, as they are, in `unit`.
    """
    values = (spec or {}).get("values")
    if not spec or not values or not values[0]:
        return None
    limit = spec.get("limit")
    values = [[value / limit if limit and _is_number(value) else value for value in row] for row in values]
    top = max((value for row in values for value in row if _is_number(value)), default=1.0)
    shape = spec.get("shape") or [len(values), len(values[0])]
    paint = colour if limit else plain_colour
    return {
        "png": png([[paint(value, top) for value in row] for row in values]),
        "rows": spec.get("rows", "rows"),
        "columns": spec.get("columns", "columns"),
        "unit": "error, in times the bound" if limit else spec.get("unit", "error"),
        "last": [max(size - 1, 0) for size in shape],
        "height": max(140, min(360, 10 * len(values))),
        "top": top,
        "limit": limit,
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
    return between(BEYOND, math.log(value) / math.log(top) if top > 1 else 1.0)


def plain_colour(value: float | None, top: float) -> Colour:
    """Clear over yellow to dark red, by the logarithm, for values whose limit is not known."""
    if not _is_number(value):
        return NOT_A_NUMBER
    clear = (*BEYOND[0][:3], 0)
    return between((clear, *BEYOND), math.log1p(max(value, 0.0)) / math.log1p(top) if top > 0 else 0.0)


def between(stops: Sequence[Colour], share: float) -> Colour:
    """The colour at `share` of the way from the first stop to the last."""
    place = min(share, 1.0) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    red, green, blue, alpha = (
        round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True)
    )
    return red, green, blue, alpha


def worst_cells(values: Sequence[Sequence[float | None]]) -> list[tuple[int, int, float]]:
    """(row, column, value) of the largest values."""
    cells = [(r, c, v) for r, row in enumerate(values) for c, v in enumerate(row) if _is_number(v)]
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


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and abs(value) < UNCOUNTABLE


def histogram(statistics: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of z on a logarithmic scale, what a normal distribution would give, and the limits; None without counts."""
    spec = statistics.get("z_histogram") or {}
    counts, edges = spec.get("counts") or [], _finite_edges(spec.get("edges") or [])
    if len(edges) == len(counts) > 1:  # the last bin is open
        edges = [*edges, 2 * edges[-1] - edges[-2]]
    total = sum(counts)
    if not total or len(edges) != len(counts) + 1:
        return None
    limit, low, span = spec.get("limit"), edges[0], edges[-1] - edges[0]
    top, sides = math.log1p(max(counts)), 2 if low >= 0 else 1  # a histogram from 0 on is one of |z|
    bars = []
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        expected = sides * total * (normal_below(right) - normal_below(left))
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
    lines = [] if limit is None else [100 * (z - low) / span for z in {-limit, limit}]
    return {
        "bars": bars,
        "lines": [place for place in lines if 0 <= place <= 100],
        "ticks": ticks(low, edges[-1]),
        "limit": limit,
        "one_sided": low >= 0,
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
