"""Laws of the stage `sampler`: equal tokens, whatever else is in the batch.

A row's token depends on its logits, its options, its seed and its position alone; that is part of the contract, so the
laws are judged whatever an implementation declares.
"""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.laws import Term, alone, changed, permuted


def judge(trial: Trial, call: Call, terms: list[Term]) -> Record:
    """The tokens that all terms give have to be equal."""
    first, *others = (term.rows(trial.invoke(term.call).long()) for term in terms)
    record = Record(elements=len(first))
    for other in others:
        differ = first != other
        if bool(differ.any()):
            row = int(differ.nonzero()[0])
            record.fail(
                f"row {row} is token {int(first[row])} in one call and {int(other[row])} in the other "
                f"({int(differ.sum())} of {len(first)} rows differ)", headroom=float("inf"), where={"row": row},
            )  # fmt: skip
    return record


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    operands = {**call.args, **call.keywords}
    return changed(call, **{name: tensor[rows] for name, tensor in operands.items() if tensor is not None})


def row_permutation(call: Call) -> list[Term]:
    """Permuted rows give permuted tokens."""
    return permuted(call, len(call.args["logits"]), _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A row's token is the same alone as in a batch."""
    return alone(call, len(call.args["logits"]), _with_rows)


def batch_split(call: Call) -> list[Term]:
    """The last rows of a batch give the same tokens without the first ones."""
    cut = len(call.args["logits"]) // 3
    return [Term(call, rows=lambda out: out[cut:]), Term(_with_rows(call, slice(cut, None)))]


def repeated(call: Call) -> list[Term]:
    """The same call gives the same tokens."""
    return [Term(call), Term(call), Term(changed(call))]


def shifted(call: Call) -> list[Term]:
    """Logits times four at a temperature times four are the same distribution, and the same draws."""
    options = {"logits": call.args["logits"] * 4.0, "temperature": call.keywords["temperature"] * 4.0}
    return [Term(call), Term(changed(call, **options))]


def logits_in_a_wider_buffer(call: Call) -> list[Term]:
    """Logits that are the first columns of a wider buffer give the same tokens, whatever is behind them."""
    logits = call.args["logits"]
    wide = torch.cat([logits, torch.full_like(logits, torch.inf)], 1)
    narrow = changed(call)
    narrow.args["logits"] = wide[:, : logits.shape[1]]
    return [Term(call), Term(narrow)]
