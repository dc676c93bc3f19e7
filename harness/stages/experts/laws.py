"""Laws of the stage `experts`; each function is one law and returns its terms."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, changed, in_two_parts, permuted, shuffled

ROW_OPERANDS = ("hidden_states", "topk_weights", "topk_ids")


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    return changed(call, **{name: call.args[name][rows] for name in ROW_OPERANDS})


def token_permutation(call: Call) -> list[Term]:
    """Permuted tokens give permuted rows."""
    return permuted(call, call.case.T, _with_rows)


def expert_relabelling(call: Call) -> list[Term]:
    """Experts may be renumbered, weights and ids together."""
    order = shuffled(call.case.E, call.case.seed)
    new_name = order.argsort()
    a = call.args
    renamed = changed(call, gate_up_proj=a["gate_up_proj"][order], down_proj=a["down_proj"][order],
                      topk_ids=new_name.to(a["topk_ids"].device)[a["topk_ids"].long()])  # fmt: skip
    return [Term(call), Term(renamed, -1.0)]


def slot_permutation(call: Call) -> list[Term]:
    """The order of a token's slots does not matter."""
    order = shuffled(call.case.k, call.case.seed)
    a = call.args
    swapped = changed(call, topk_weights=a["topk_weights"][:, order], topk_ids=a["topk_ids"][:, order])
    return [Term(call), Term(swapped, -1.0)]


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    return in_two_parts(call, call.case.T, _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A token's row is the same alone as in a batch."""
    return alone(call, call.case.T, _with_rows)


def weight_linearity(call: Call) -> list[Term]:
    """The result is linear in the routing weights, each slot of its own."""
    weights = call.args["topk_weights"]
    other = weights.roll(1, dims=-1) * 0.5
    return [Term(call), Term(changed(call, topk_weights=other)),
            Term(changed(call, topk_weights=_sum(weights, other)), -1.0)]  # fmt: skip


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() + b.double()).to(a.dtype)


def power_of_two(call: Call) -> list[Term]:
    """Routing weights times 256, far above 1, give the result times 256."""
    return [Term(call, 256.0), Term(changed(call, topk_weights=call.args["topk_weights"] * 256.0), -1.0)]


def tiny_weights(call: Call) -> list[Term]:
    """Routing weights of a millionth count like any other."""
    scale = 2.0**-20
    return [Term(call), Term(changed(call, topk_weights=call.args["topk_weights"] * scale), -1.0 / scale)]


def _first_slot_off(call: Call) -> Tensor:
    off = torch.zeros_like(call.args["topk_ids"], dtype=torch.bool)
    off[::2, 0] = True
    return off


def masked_is_zero_weight(call: Call) -> list[Term]:
    """An id of -1 is a slot of weight 0."""
    off, a = _first_slot_off(call), call.args
    masked = changed(call, topk_ids=a["topk_ids"].masked_fill(off, -1))
    return [Term(masked), Term(changed(call, topk_weights=a["topk_weights"].masked_fill(off, 0.0)), -1.0)]


def duplicates_add(call: Call) -> list[Term]:
    """The same expert in two slots counts with the sum of both weights."""
    a = call.args
    ids, weights = a["topk_ids"].clone(), a["topk_weights"].clone()
    ids[:, 1] = ids[:, 0]
    weights[:, 1] = weights[:, 0] * 0.5  # exact, and so is the sum in every dtype: three halves of a power of two ...
    weights[:, 0] = (weights[:, 0].double().log2().floor().exp2()).to(weights.dtype)
    weights[:, 1] = weights[:, 0] * 0.5
    single, merged = ids.clone(), weights.clone()
    single[:, 1], merged[:, 0] = -1, weights[:, 0] * 1.5
    return [Term(changed(call, topk_ids=ids, topk_weights=weights)),
            Term(changed(call, topk_ids=single, topk_weights=merged), -1.0)]  # fmt: skip


def _padded(call: Call, fill: float) -> list[Term]:
    a, size = call.args, call.case.T
    extra = 5
    rows = a["hidden_states"].new_full((extra, call.case.H), fill)
    more = changed(call, hidden_states=torch.cat([a["hidden_states"], rows]),
                   topk_weights=torch.cat([a["topk_weights"], a["topk_weights"][:1].expand(extra, -1)]),
                   topk_ids=torch.cat([a["topk_ids"], a["topk_ids"][:1].expand(extra, -1)]))  # fmt: skip
    return [Term(call), Term(more, -1.0, lambda out: out[:size])]


def padding_zero(call: Call) -> list[Term]:
    """Rows of zeros behind the batch change no other row."""
    return _padded(call, 0.0)


def padding_nan(call: Call) -> list[Term]:
    """Rows of NaN behind the batch change no other row."""
    return _padded(call, float("nan"))


def padding_huge(call: Call) -> list[Term]:
    """Rows of 1e30 (6e4 in fp16) behind the batch change no other row."""
    return _padded(call, 6e4 if call.case.dtype == "fp16" else 1e30)


def unused_expert_removed(call: Call) -> list[Term]:
    """An expert that nobody chose may be taken away, and the ids above it renumbered."""
    a, gone = call.args, call.case.E // 2
    ids = a["topk_ids"].long()
    ids = torch.where(ids == gone, (gone + 1) % call.case.E, ids)
    keep = [e for e in range(call.case.E) if e != gone]
    fewer = changed(
        call, gate_up_proj=a["gate_up_proj"][keep], down_proj=a["down_proj"][keep], topk_ids=ids - (ids > gone).long()
    )
    return [Term(changed(call, topk_ids=ids)), Term(fewer, -1.0)]
