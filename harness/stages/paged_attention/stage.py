"""The stage `paged_attention`: data whose faults show, and the bound of a right result."""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.memory import FINITE_POISON
from moe_harness.harness.core.stage import Declared, Output, Stage
from moe_harness.harness.stages.paged_attention.bound import attention
from moe_harness.harness.stages.paged_attention.cases import PagedAttentionCase
from moe_harness.harness.stages.paged_attention.contract import ROUNDINGS
from moe_harness.harness.stages.paged_attention.exact import picked, pointed
from moe_harness.reference.paged_attention import gather

WILD = 1 << 30  # a table entry that is no page's number
SPARE = 2  # pages that no sequence has


class Sequence(NamedTuple):
    """One sequence of a call: its queries' rows and its keys and values in order."""

    rows: slice
    keys: Tensor  # [length, Hk, D]
    values: Tensor


class PagedAttention(Stage):
    """Causal attention over pages."""

    def build(self, case: PagedAttentionCase, device: str) -> Call:
        draw = Builder(case, device)
        ints, shapes = INTS[case.ids], case.sequences()
        table, pages = _table(case, draw, shapes)
        counts = [count for count, _ in shapes]
        start = torch.tensor([0, *accumulate(counts)])
        lengths = torch.tensor([length for _, length in shapes], dtype=torch.int64)
        if case.data in ("exact", "large"):
            q, keys, values = pointed(case, draw, shapes, table, pages)
        else:
            q, keys, values = _drawn(case, draw, sum(counts), pages)
        _make_special(case, q, keys, values, table, start, lengths)
        owned = _owned(case, shapes, table, pages)
        stale = float("nan") if case.stale == "nan" else FINITE_POISON
        for cache in (keys, values):
            cache[~owned] = stale
        args = {
            "q": draw.place("q", q),
            "key_cache": _cache(case, draw, "key_cache", keys),
            "value_cache": _cache(case, draw, "value_cache", values),
            "block_table": draw.place("block_table", table, ints),
            "query_start": draw.place("query_start", start, ints),
            "context_len": draw.place("context_len", lengths, ints),
        }  # fmt: skip
        return Call(case, args, {"scale": case.scale or case.D**-0.5}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        q = call.args["q"]
        return [Output("the result", tuple(q.shape), q.dtype)]

    def expect(self, call: Call, declared: Declared) -> bounds.Bound:
        q, key_cache = call.args["q"], call.args["key_cache"]
        rounds = frozenset(ROUNDINGS if declared is None else declared)
        value, variance, shared, extreme = torch.zeros(4, *q.shape, dtype=torch.float64, device=q.device)
        sources = torch.ones(*q.shape[:2], 2, dtype=torch.float64, device=q.device)
        for rows, keys, values in sequences(call):
            count, length = rows.stop - rows.start, len(keys)
            position = torch.arange(length - count, length, device=q.device)
            visible = torch.arange(length, device=q.device) <= position[:, None]
            group = q.shape[1] // key_cache.shape[2]
            wide, of_wide = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
            value[rows], variance[rows], shared[rows], extreme[rows], sources[rows] = attention(
                q[rows].double(), wide, of_wide, visible, scale=call.keywords["scale"], rounds=rounds, dtype=q.dtype
            )
        drift = bounds.drift_to(value, extreme) if bounds.in_tf32(rounds, q.dtype) else None
        return bounds.Bound(value, bounds.finish(value, variance, q.dtype), shared, sources.view(-1, 2), drift)

    def exact_value(self, call: Call) -> Tensor:
        """The value of the key that each query picks."""
        return picked(call)

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        token, head = divmod(row, call.args["q"].shape[1])
        sequence = int(torch.searchsorted(call.args["query_start"].long(), token, right=True)) - 1
        return {"sequence": sequence, "token": token, "head": head, "element": column,
                "keys": int(call.args["context_len"][sequence])}  # fmt: skip

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        heads, rows = call.args["q"].shape[1], len(call.args["q"])
        of_row = torch.arange(rows * heads, device=call.args["q"].device) % max(1, heads)
        return {f"head {head}": of_row == head for head in range(min(heads, 8))}


STAGE = PagedAttention()


def sequences(call: Call) -> list[Sequence]:
    """Those that have queries and keys, read from the operands."""
    _, key_cache, value_cache, table, start, lengths = call.args.values()
    bounds_, found = start.tolist(), []
    for s, length in enumerate(lengths.tolist()):
        if length > 0 and bounds_[s] < bounds_[s + 1]:
            keys, values = (gather(cache, table[s], length) for cache in (key_cache, value_cache))
            found.append(Sequence(slice(bounds_[s], bounds_[s + 1]), keys, values))
    return found


def _table(case: PagedAttentionCase, draw: Builder, shapes: list[tuple[int, int]]) -> tuple[Tensor, int]:
    """(int64 [S, M], number of pages): pages in random order, with columns behind every sequence's end."""
    needed = [-(-length // case.page) for _, length in shapes]
    columns = max(needed, default=0) + 2
    pages = sum(needed) + SPARE if case.data != "large" else (1 << 31) // (case.page * case.Hk * case.D) + 1
    order = torch.randperm(sum(needed) + SPARE, generator=draw.generator)
    order = order if case.data != "large" else pages - 1 - order
    table = (
        draw.integers(0, pages, (len(shapes), columns))
        if case.past == "pages"
        else torch.full((len(shapes), columns), WILD)
    )
    for s, (first, count) in enumerate(zip(accumulate([0, *needed]), needed, strict=False)):
        table[s, :count] = order[first : first + count]
    if case.shared and len(shapes) > 1:  # as far as both are full, so that nobody's last page is another's middle
        whole = [length // case.page for _, length in shapes]
        for s in range(1, len(shapes)):
            both = min(whole[0], whole[s])
            table[s, :both] = table[0, :both]
    return table, pages


def _owned(case: PagedAttentionCase, shapes: list[tuple[int, int]], table: Tensor, pages: int) -> Tensor:
    """Bool [P, page], slots that hold a key of some sequence."""
    owned = torch.zeros(pages, case.page, dtype=torch.bool)
    for s, (_, length) in enumerate(shapes):
        at = torch.arange(length)
        owned[table[s, at // case.page], at % case.page] = True
    return owned


def _drawn(case: PagedAttentionCase, draw: Builder, rows: int, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a spread of about 1.5, so that many keys count and no two alike."""
    gain = 1.5 / ((case.scale or case.D**-0.5) * case.D**0.5)
    q = draw.large_normal(rows, case.Hq, case.D).float() * gain
    shape = (pages, case.page, case.Hk, case.D)
    return q, draw.large_normal(*shape).float(), draw.large_normal(*shape).float()


def _make_special(
    case: PagedAttentionCase, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, lengths: Tensor
) -> None:
    if case.data == "q_nan" and len(q):
        q[len(q) // 2, 0, 0] = float("nan")
    elif case.data == "key_nan" and len(lengths):  # of the last sequence alone: it shares its pages with nobody
        last = int(lengths[-1]) - 1
        keys[table[-1, last // case.page], last % case.page] = float("nan")
    elif case.data in ("far_scores", "negative_scores"):
        # Every score is moved by about 200, beyond what exp takes in fp32.
        keys[..., 0] = 20.0 * (1 if case.data == "far_scores" else -1)
        q[..., 0] = 10.0 / (case.scale or case.D**-0.5)
    elif case.data == "same_keys":
        keys[:] = keys[:1, :1]
    elif case.data == "one_peak":
        q *= 8.0
    elif case.data == "offset_values":
        values += 4.0
    elif case.data == "huge_values":
        values *= 2.0 ** (9 if case.dtype == "fp16" else 20)  # beyond fp16 where the dtype is


def _cache(case: PagedAttentionCase, draw: Builder, name: str, values: Tensor) -> Tensor:
    """[P, page, Hk, D], laid out token by token or head by head inside a page."""
    if case.order == "head":
        return draw.place(name, values.transpose(1, 2)).transpose(1, 2)
    return draw.place(name, values)
