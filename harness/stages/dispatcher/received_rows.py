"""Where a dispatcher went wrong, read from tags and from the parts that each rank should have contributed.

Every statement is {"fault": ..., "evidence": ...}; the first ones are the most telling.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import EXACT_FIT
from moe_harness.harness.core.least_squares import least_squares
from moe_harness.harness.core.ranked_task import differing_rows
from moe_harness.harness.diagnosis.plain import ADVICE
from moe_harness.harness.diagnosis.plain import kind as plain_kind
from moe_harness.harness.stages.dispatcher.data import World, tagged_token
from moe_harness.reference.dispatcher import Batch, owned_experts

Statement = dict[str, str]
FEW = 4


def contributions(world: World, rank: int) -> Tensor:
    """What each rank q owes to the tokens of `rank`: fp64 [R, T_r, H]; their sum is the dense layer."""
    batch = world.batches[rank]
    rows, weights = batch.hidden_states.double(), batch.topk_weights.double()
    parts = torch.zeros(len(world.batches), *rows.shape, dtype=torch.float64)
    for expert in batch.topk_ids[batch.topk_ids >= 0].unique().tolist():
        tokens, slots = (batch.topk_ids == expert).nonzero(as_tuple=True)
        values = weights[tokens, slots, None] * world.expert(expert, rows[tokens])
        holder = int((world.logical == expert).nonzero()[0])  # of several copies any: their sum is what counts
        parts[int(world.owner[holder])].index_add_(0, tokens, values)
    return parts


def plain(out: Tensor, given: Batch) -> list[Statement]:
    """The name of a result that says nothing of how it was computed."""
    name, operand = plain_kind(out.cpu(), given._asdict())
    return [] if name is None else [_say(name, ADVICE[name].format(operand))]


def fit(got: Tensor, parts: Tensor, wrong: Tensor) -> list[Statement]:
    """How often each rank's part is in the result: got = sum_q a_q * part_q, where that fits exactly."""
    tokens = [
        t for t in range(len(got)) if bool(torch.isfinite(got[t]).all()) and bool(torch.isfinite(parts[:, t]).all())
    ]
    used = [q for q in range(len(parts)) if bool(parts[q, tokens].any())]
    if not used or not set(tokens) & set(wrong.tolist()):
        return []
    matrix = parts[used][:, tokens].flatten(1).T
    target = got[tokens].flatten()
    counts = least_squares(matrix, target)
    if not torch.allclose(matrix @ counts, target, rtol=0, atol=EXACT_FIT * float(target.abs().max() + 1)):
        return []
    ratios = {q: round(float(a), 4) for q, a in zip(used, counts, strict=True)}
    if set(ratios.values()) == {float(len(parts))} and len(parts) > 1:
        return [{"fault": "reduced twice", "evidence": f"the result is {len(parts)} times the layer: complete results "
                 "were summed over the ranks again"}]  # fmt: skip
    lost = [q for q, a in ratios.items() if abs(a) < 1e-3]
    if lost:
        return [{"fault": "contribution lost", "evidence": f"the parts of ranks {lost} are missing (times "
                 f"{ratios} by rank)"}]  # fmt: skip
    return [{"fault": "contribution counted wrongly", "evidence": f"parts of ranks enter {ratios} times"}]


def displaced(got: Tensor, world: World, rank: int, wrong: Tensor) -> list[Statement]:
    """Rows of the result that are another token's right result."""
    found = []
    for token in wrong.tolist()[:FEW]:
        for source in range(len(world.batches)):
            right = contributions(world, source).sum(0)
            same = [t for t in range(len(right)) if not len(differing_rows(got[token : token + 1], right[t : t + 1]))]
            same = [t for t in same if (source, t) != (rank, token) and bool(right[t].any())]
            if same:
                found.append({"fault": "row of another token",
                              "evidence": f"token {token} of rank {rank} got the result of token {same[0]} of rank "
                              f"{source}"})  # fmt: skip
                break
    return found


def explain(d: Any, world: World, rank: int) -> list[Statement]:
    """What the received rows say: tokens that never came, came without need, with wrong experts or weights."""
    wanted, numbers = _wanted(world, rank)
    got = _got(d, world, rank)
    statements: list[Statement] = []
    for (token, expert), weight in wanted.items():
        if (token, expert) not in got:
            statements.append(_say("row lost", f"{_name(numbers, token)} was not run through expert {expert}, "
                                   f"which is on rank {rank}"))  # fmt: skip
        elif got[token, expert] != weight:
            statements.append(_say("weight changed", f"{_name(numbers, token)} came to expert {expert} with weight "
                                   f"{got[token, expert]:g}, but should have {weight:g}"))  # fmt: skip
    for token, expert in got:
        if (token, expert) not in wanted:
            what = _name(numbers, token) if token in numbers else "a row that is no token (padding or changed payload)"
            statements.append(_say("row not wanted", f"{what} was given to expert {expert} of rank {rank}"))
    return [*statements, *_changed_payload(d, world)][:FEW]


def _changed_payload(d: Any, world: World) -> list[Statement]:
    """Rows that carry a token's tag but not its values."""
    originals = {tagged_token(row): row for batch in world.batches for row in batch.hidden_states}
    found = []
    for s, row in enumerate(d.hidden_states.cpu()):
        original = originals.get(tagged_token(row))
        used = s < len(d.topk_ids) and bool((d.topk_ids[s] >= 0).any())
        if used and original is not None and not torch.equal(row.nan_to_num(), original.nan_to_num()):
            column = int((row.nan_to_num() != original.nan_to_num()).nonzero()[0])
            found.append(_say("payload changed", f"row {s} has {row[column]:g} in column {column}, but was sent as "
                              f"{original[column]:g}"))  # fmt: skip
    return found


def _say(fault: str, evidence: str) -> Statement:
    return {"fault": fault, "evidence": evidence}


def _name(numbers: dict[int, tuple[int, int]], token: int) -> str:
    return f"token {numbers[token][1]} of rank {numbers[token][0]}"


def _wanted(world: World, rank: int) -> tuple[dict[tuple[int, int], float], dict[int, tuple[int, int]]]:
    """(token number, global expert) -> total weight that `rank` has to run; and each number's (rank, token)."""
    wanted: Counter[tuple[int, int]] = Counter()
    numbers: dict[int, tuple[int, int]] = {}
    for source, batch in enumerate(world.batches):
        for t, row in enumerate(batch.hidden_states):
            token = tagged_token(row)
            if token in numbers:  # replicated tokens: the same on every rank, run once
                continue
            numbers[token] = (source, t)
            for weight, expert in zip(batch.topk_weights[t].tolist(), batch.topk_ids[t].tolist(), strict=True):
                if expert >= 0 and int(world.owner[expert]) == rank:
                    wanted[token, expert] += weight
    return dict(wanted), numbers


def _got(d: Any, world: World, rank: int) -> dict[tuple[int, int], float]:
    experts = owned_experts(world.owner, rank).tolist()
    got: Counter[tuple[int, int]] = Counter()
    rows, weights, ids = d.hidden_states.cpu(), d.topk_weights.cpu(), d.topk_ids.cpu()
    for s in range(min(len(rows), len(ids), len(weights))):
        token = tagged_token(rows[s])
        for weight, local in zip(weights[s].tolist(), ids[s].tolist(), strict=False):
            if 0 <= local < len(experts):
                got[token, experts[local]] += weight
    return dict(got)
