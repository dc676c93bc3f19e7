"""Laws of the stage `paged_attention`; each function is one law and returns its terms."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, changed, shuffled


def _rows_of(call: Call) -> list[Tensor]:
    """Row numbers of each sequence's queries."""
    start = call.args["query_start"].tolist()
    return [torch.arange(a, b) for a, b in zip(start, start[1:], strict=False)]


def _starts(rows: list[Tensor]) -> Tensor:
    return torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])


def _selected(call: Call, chosen: list[int], rows: list[Tensor], lengths: Tensor | None = None) -> Call:
    """The call on these sequences in this order, with these rows of queries each."""
    a, device = call.args, call.args["q"].device
    at = torch.tensor(chosen, dtype=torch.int64, device=device)
    return changed(
        call, q=a["q"][torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(device)],
        block_table=a["block_table"][at], query_start=_starts(rows).to(device),
        context_len=a["context_len"][at] if lengths is None else lengths.to(device),
    )  # fmt: skip


def sequence_permutation(call: Call) -> list[Term]:
    """Permuted sequences give permuted blocks of rows."""
    rows = _rows_of(call)
    order = shuffled(len(rows), call.case.seed).tolist()
    moved = torch.cat([rows[s] for s in order])
    return [Term(call, rows=lambda out: out[moved]), Term(_selected(call, order, [rows[s] for s in order]), -1.0)]


def row_alone(call: Call) -> list[Term]:
    """A sequence is the same alone as in a batch."""
    rows = _rows_of(call)
    s = call.case.seed % len(rows)
    return [Term(call, rows=lambda out: out[rows[s]]), Term(_selected(call, [s], [rows[s]]), -1.0)]


def page_permutation(call: Call) -> list[Term]:
    """Pages may lie anywhere."""
    a = call.args
    order = shuffled(len(a["key_cache"]), call.case.seed).to(a["q"].device)
    inverse = order.argsort()
    table = a["block_table"].long()
    known = (table >= 0) & (table < len(order))
    moved = torch.where(known, inverse[table.where(known, 0)], table)
    return [Term(call), Term(changed(call, key_cache=a["key_cache"][order], value_cache=a["value_cache"][order],
                                     block_table=moved), -1.0)]  # fmt: skip


def other_page_size(call: Call) -> list[Term]:
    """Pages cut in two say the same: page p becomes pages 2 p and 2 p + 1."""
    a = call.args
    halves = {name: a[name].unflatten(1, (2, -1)).flatten(0, 1) for name in ("key_cache", "value_cache")}
    table = a["block_table"].long()
    return [Term(call), Term(changed(call, **halves, block_table=torch.stack([2 * table, 2 * table + 1], 2).flatten(1)),
                             -1.0)]  # fmt: skip


def chunk_in_two(call: Call) -> list[Term]:
    """A chunk in two calls, the first of which sees fewer keys, is the chunk in one."""
    rows, lengths = _rows_of(call), call.args["context_len"].cpu().long()
    cuts = [len(r) // 2 for r in rows]
    first = [r[:cut] for r, cut in zip(rows, cuts, strict=True)]
    second = [r[cut:] for r, cut in zip(rows, cuts, strict=True)]
    shorter = lengths - torch.tensor([len(r) for r in second])
    everyone = list(range(len(rows)))

    def spread(parts: list[Tensor]) -> Callable[[Tensor], Tensor]:
        at, total = torch.cat(parts), sum(map(len, rows))
        return lambda out: out.new_zeros(total, *out.shape[1:]).index_copy_(0, at.to(out.device), out)

    return [
        Term(call), Term(_selected(call, everyone, first, shorter), -1.0, spread(first)),
        Term(_selected(call, everyone, second), -1.0, spread(second)),
    ]  # fmt: skip


def values_times_four(call: Call) -> list[Term]:
    """Values times four give the result times four."""
    return [Term(call, 4.0), Term(changed(call, value_cache=call.args["value_cache"] * 4.0), -1.0)]


def heads_permuted(call: Call) -> list[Term]:
    """Key/value heads may change places, with the query heads that share them."""
    a, case = call.args, call.case
    order = shuffled(case.Hk, case.seed).to(a["q"].device)
    group = case.Hq // case.Hk
    of_queries = (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
    other = changed(call, q=a["q"][:, of_queries], key_cache=a["key_cache"][:, :, order],
                    value_cache=a["value_cache"][:, :, order])  # fmt: skip
    return [Term(call, rows=lambda out: out.unflatten(1, (case.Hq, -1))[:, of_queries].flatten(1) if out.dim() == 2
                 else out[:, of_queries]), Term(other, -1.0)]  # fmt: skip


def table_behind_the_end(call: Call) -> list[Term]:
    """What a table holds behind a sequence's end is nobody's business."""
    a, page = call.args, call.args["key_cache"].shape[1]
    column = torch.arange(a["block_table"].shape[1], device=a["q"].device)
    behind = column >= -(-a["context_len"].long() // page)[:, None]
    return [Term(call), Term(changed(call, block_table=a["block_table"].long().masked_fill(behind, 0)), -1.0)]
