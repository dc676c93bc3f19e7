"""Laws of the stage `router`.  A law gives a changed call and the way back from its result to that of the first.

Two results of one token agree when they choose the same set with the same weights; another set is right only on a
near-tie, which the judgement of each result decides.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.laws import Term, changed, shuffled
from moe_harness.harness.stages.router.bound import agreement_limit

if TYPE_CHECKING:
    from moe_harness.harness.core.invocation import Trial

Result = tuple[Tensor, Tensor]  # topk_weights, topk_ids
Law = list[Term]  # the first call, and the changed one with the way back from its result to that of the first


def _picked(rows: Tensor | slice) -> Callable[[Result], Result]:
    return lambda result: (result[0][rows], result[1][rows])


def token_permutation(call: Call) -> Law:
    """Permuted tokens give permuted rows."""
    order = shuffled(call.case.T, call.case.seed)
    permuted = changed(call, router_logits=call.args["router_logits"][order])
    return [Term(call, rows=_picked(order)), Term(permuted)]


def expert_relabelling(call: Call) -> Law:
    """Experts may be renumbered (there are no groups in these cases)."""
    order = shuffled(call.case.E, call.case.seed)
    bias = call.keywords["correction_bias"]
    renamed = changed(call, router_logits=call.args["router_logits"][:, order],
                      **({} if bias is None else {"correction_bias": bias[order]}))  # fmt: skip
    return [Term(call), Term(renamed, rows=lambda r: (r[0], order.to(r[1].device)[r[1].long()]))]


def batch_split(call: Call) -> Law:
    """The last two thirds of a batch by themselves."""
    rows = slice(call.case.T // 3, None)
    return [Term(call, rows=_picked(rows)), Term(changed(call, router_logits=call.args["router_logits"][rows]))]


def row_alone(call: Call) -> Law:
    """One token by itself."""
    row = call.case.seed % call.case.T
    rows = slice(row, row + 1)
    return [Term(call, rows=_picked(rows)), Term(changed(call, router_logits=call.args["router_logits"][rows]))]


def softmax_shift(call: Call) -> Law:
    """Softmax does not see a constant added to a row; sixteenths in [-7, 7] stay exact under -8 in every dtype."""
    grid = (call.args["router_logits"].float() * 16).round().clamp(-112, 112) / 16
    return [Term(changed(call, router_logits=grid)), Term(changed(call, router_logits=grid - 8.0))]


def scale_is_linear(call: Call) -> Law:
    """routed_scaling_factor multiplies the weights and nothing else."""
    factor = call.keywords["routed_scaling_factor"]
    scaled = changed(call)
    scaled.keywords["routed_scaling_factor"] = factor * 4.0
    return [Term(call), Term(scaled, rows=lambda r: (r[0] / 4.0, r[1]))]


def disagreement(first: Result, second: Result) -> tuple[Tensor, Tensor]:
    """(rows that chose the same set, largest relative difference of their weights), both [rows]."""
    (weights_a, ids_a), (weights_b, ids_b) = ((w.double(), i.long()) for w, i in (first, second))
    order_a, order_b = ids_a.argsort(-1), ids_b.argsort(-1)
    same = (ids_a.gather(-1, order_a) == ids_b.gather(-1, order_b)).all(-1)
    a, b = weights_a.gather(-1, order_a), weights_b.gather(-1, order_b)
    scale = torch.maximum(a.abs(), b.abs()).clamp(min=2.0**-120)
    return same, ((a - b).abs() / scale).amax(-1)


def judge(trial: "Trial", call: Call, law: Law) -> Record:
    """Both results by themselves, then whether they agree."""
    results = [trial.invoke(term.call) for term in law]
    record = trial.judge(law[0].call, results[0])
    record.merge(trial.judge(law[1].call, results[1]), "the changed call: ")
    if record.findings:
        return record
    same, difference = disagreement(*(term.rows(result) for term, result in zip(law, results, strict=True)))
    keywords, dtypes = law[0].call.keywords, [results[0][0].dtype]
    if "routing_weight" in bounds.permitted(trial.subject.declared.rounds):
        dtypes.append(call.args["router_logits"].dtype)
    logits = [term.call.args["router_logits"] for term in law]
    limit = agreement_limit(logits, keywords["scoring"], keywords["top_k"], dtypes)
    used = torch.where(same, difference / limit, 0.0)
    record.worst = max(record.worst, float(used.max()))
    if record.worst > 1:
        row = int(used.argmax())
        record.fail(f"the weights of row {row} differ by {float(difference[row]):.3g} of their size, limit {limit:.3g}",
                    headroom=float(used.max()), where={"token": row})  # fmt: skip
    return record
