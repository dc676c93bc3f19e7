r"""What each slot of a small layer was really computed from, whatever the kernel's mistake.

Every pair of an expert e and a row s of hidden_states gives one vector o_e(x_s).  With few of both, and more columns
than pairs, each row of the result is written as a sum of them in one way only:

    out[t] = sum over (e, s) of c[t, e, s] * o_e(x_s)       by least squares; right: s = t, e = the ids, c = the weights

so that rows of other tokens, other experts, weights of other slots and lost slots are read off.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.least_squares import least_squares
from moe_harness.harness.core.memory import poisoned_allocations
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.reference.experts import expert_steps, local_ids
from moe_harness.reference.grouped_linear import row_experts

SMALL = ExpertsCase(T=5, E=4, k=2, H=64, I=24)  # 20 pairs, 64 columns
NOTHING = 1e-3  # of the largest factor: what least squares leave of a pair that is not there
NEAR = 0.02  # relative: weights are drawn further apart

Pair = tuple[int, int]  # expert, row
# How rows are found that were not repeated as they should: slot j of token t reads row ...
ROWS: dict[str, Callable[[int, int, int, int], int]] = {
    "(t * k + j) mod T: the rows are repeated as a whole, not one by one": lambda t, j, T, k: (t * k + j) % T,
    "(j * T + t) // k: the rows are repeated one by one, not as a whole": lambda t, j, T, k: (j * T + t) // k,
    "t + 1": lambda t, j, T, k: (t + 1) % T,
    "t - 1": lambda t, j, T, k: (t - 1) % T,
    "0": lambda t, j, T, k: 0,
    "T - 1 - t": lambda t, j, T, k: T - 1 - t,
}


def read_off(trial: Trial, case: Case) -> list[str]:
    """A sentence on the rows or experts that slots were computed from in a small call; [] where that is not seen."""
    if case.stage == "experts":
        return _of_experts_call(trial, case)
    if case.stage == "grouped_linear":
        return _of_linear_call(trial, GroupedLinearCase(dtype=case.dtype))
    return []


def _wrong_result(trial: Trial, call: Call) -> Tensor | None:
    try:
        with poisoned_allocations(trial.device):
            out = trial.invoke(call)
    except (Rejected, Broken):
        return None
    return out if trial.judge(call, out).findings else None


def _of_linear_call(trial: Trial, case: Case) -> list[str]:
    """Rows of a grouped linear layer that went through the weights of another group."""
    call = trial.build(case)
    out = _wrong_result(trial, call)
    if out is None:
        return []
    x, weight, sizes = call.args.values()
    own = row_experts(sizes)
    every = torch.einsum("sk,enk->sen", x.double(), weight.double())
    off = (every - out.double()[:, None]).norm(dim=2) / every.norm(dim=2)
    used = off.argmin(1)
    found = off.amin(1) < NEAR
    others = (used - own)[found & (used != own)]
    zero = int((out == 0).all(1).sum())
    if 2 * len(others) < int((~found | (used != own)).sum()) - zero or not len(others):
        return []
    apart = int(others.mode().values)
    near = {-1: "of the group before their own", 1: "of the group after their own"}
    which = near.get(apart, f"{apart:+d} groups away")
    left = f", and {zero} of the others are zero" if zero else ""
    return [f"in a small call {int((others == apart).sum())} of {len(x)} rows go through the weights {which}{left}"]


def _of_experts_call(trial: Trial, case: Case) -> list[str]:
    assert isinstance(case, ExpertsCase)
    call = trial.build(SMALL.but(dtype=case.dtype, activation=case.activation))
    out = _wrong_result(trial, call)
    if out is None:
        return []
    pairs = _pairs(trial, call, out)
    ids = local_ids(call.args["topk_ids"], call.keywords["expert_map"])
    return [] if pairs is None else _of_rows(pairs, ids) or _of_experts(pairs, ids) or _last_wins(pairs, ids)


def _pairs(trial: Trial, call: Call, out: Tensor) -> list[dict[Pair, float]] | None:
    """For each token its pairs and their factors; None where some row is no sum of few of them."""
    hidden, gate_up, down, weights, _ = (operand.double() for operand in call.args.values())
    vectors = torch.stack([
        expert_steps(hidden, gate_up[e], down[e], call.keywords["activation"]).output for e in range(len(gate_up))
    ])  # fmt: skip
    design = vectors.flatten(0, 1).T  # [H, E * T]
    sigma = trial.stage.expect(call, None).variance.sqrt()
    found = []
    for token, row in enumerate(out.double()):
        if not bool(row.isfinite().all()):
            return None
        scale = sigma[token].clamp(min=float(sigma.max()) * 1e-3 + 1e-300)
        factors = least_squares(design / scale[:, None], row / scale)
        least = NOTHING if call.case.dtype == "fp32" else 10 * NEAR
        there = factors.abs() > least * float(weights.max())
        kept = least_squares(design[:, there] / scale[:, None], row / scale)
        left = (row - design[:, there] @ kept) / scale
        if int(there.sum()) > call.args["topk_ids"].shape[1] or float(left.abs().max()) > 2 * bounds.max_limit():
            return None
        places = there.nonzero()[:, 0].tolist()
        tokens = len(hidden)
        found.append({(place // tokens, place % tokens): float(f) for place, f in zip(places, kept, strict=True)})
    return found


def _of_rows(pairs: list[dict[Pair, float]], ids: Tensor) -> list[str]:
    """The right experts on other tokens' rows."""
    tokens, slots = ids.shape
    rows: dict[Pair, int] = {}  # (token, slot) -> row
    for token, seen in enumerate(pairs):
        row_of = dict(seen.keys())
        if len(row_of) != len(seen) or set(row_of) != set(ids[token].tolist()):
            return []
        rows |= {(token, slot): row_of[expert] for slot, expert in enumerate(ids[token].tolist())}
    moved = [place for place, row in rows.items() if row != place[0]]
    if not moved:
        return []
    some = ", ".join(f"slot {j} of token {t} on row {rows[t, j]}" for t, j in moved[:3])
    told = [f"in a small call the experts run on rows of other tokens: {some}"]
    for rule, of in ROWS.items():
        if all(of(t, j, tokens, slots) == row for (t, j), row in rows.items()):
            told.append(f"slot j of token t reads row {rule}")
    return told


def _of_experts(pairs: list[dict[Pair, float]], ids: Tensor) -> list[str]:
    """Other experts on the right rows, each in the place of one."""
    if any(row != token for token, seen in enumerate(pairs) for _, row in seen):
        return []
    for by in range(1, int(ids.max()) + 2):
        for sign in (1, -1):
            count = SMALL.E
            wanted = [{(expert + sign * by) % count for expert in of} for of in ids.tolist()]
            if by <= count // 2 and wanted == [{expert for expert, _ in seen} for seen in pairs]:
                other = f"expert e {'+' if sign > 0 else '-'} {by}"
                return [f"in a small call the weights of {other} are used for expert e"]
    return []


def _last_wins(pairs: list[dict[Pair, float]], ids: Tensor) -> list[str]:
    """One slot a token, always that of its highest or lowest expert."""
    if any(len(seen) != 1 or next(iter(seen))[1] != token for token, seen in enumerate(pairs)):
        return []
    kept = [next(iter(seen))[0] for seen in pairs]
    for name, best in (("highest", max), ("lowest", min)):
        if kept == [best(of) for of in ids.tolist()]:
            why = "what one expert adds is overwritten by another"
            return [f"each token counts only the slot of its {name} expert: {why}"]
    return []
