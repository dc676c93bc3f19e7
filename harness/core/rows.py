"""Some rows of a call as a call of their own: every row of a result depends on its own rows of the operands alone."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Bound
from moe_harness.harness.core.call import Call
from moe_harness.reference.grouped_linear import row_experts

# The operands that have a row for each row of the result.
WITH_ROWS = {
    "experts": ("hidden_states", "topk_weights", "topk_ids"),
    "router": ("router_logits",),
    "grouped_linear": ("x",),
    "shared_expert_gate": ("hidden_states", "shared_output"),
    "moe_block": ("hidden_states",),
}


def matrix(tensor: Tensor) -> Tensor:
    """Leading dimensions flattened, a vector as one row; apart from any graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def count(call: Call) -> int:
    """Number of rows of the result."""
    return len(matrix(call.args[WITH_ROWS[call.case.stage][0]]))


def part(call: Call, rows: Tensor) -> Call:
    """The call on these rows (int64 row numbers) only, with what is right for it where that is known."""
    args = {n: matrix(v)[rows] if n in WITH_ROWS[call.case.stage] else v for n, v in call.args.items()}
    made = Call(call.case, args, call.keywords, truth=_truth(call.truth, rows))
    return _few_experts(call, made, rows) if call.case.stage == "grouped_linear" else made


def spread(call: Call, rows: Tensor, most: int) -> Call:
    """The call on at most `most` of these rows, evenly spread."""
    if len(rows) > most:
        rows = rows[torch.linspace(0, len(rows) - 1, most).round().long().to(rows.device)]
    return part(call, rows)


def of_result(result: Any, rows: Tensor) -> Any:
    """These rows of what an implementation returned, a tensor or a tuple of them."""
    return tuple(matrix(r)[rows] for r in result) if isinstance(result, tuple) else matrix(result)[rows]


def _few_experts(call: Call, made: Call, rows: Tensor) -> Call:
    """The sizes of the groups follow; only the experts of these rows and their neighbours stay."""
    weight, bias = call.args["weight"], call.keywords["bias"]
    owners = row_experts(call.args["group_sizes"])[rows]
    kept = torch.cat([owners, (owners + 1) % max(1, len(weight))]).unique()
    sizes = torch.bincount(torch.searchsorted(kept, owners), minlength=len(kept))
    made.args |= {"weight": weight[kept], "group_sizes": sizes}
    made.keywords = {"bias": None if bias is None else bias[kept]}
    return made


def _truth(truth: Any, rows: Tensor) -> Any:
    if isinstance(truth, Bound):
        return truth.part(rows)
    return None if truth is None else matrix(truth)[rows]
