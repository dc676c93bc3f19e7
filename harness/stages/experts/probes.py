"""What an implementation of the stage `experts` stores, and how it sums."""

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.probing import BITS, GATE, TERMS, Sum, first_column, split_terms
from moe_harness.harness.stages.experts.cases import ExpertsCase


def products(trial: Trial, dtype: str) -> dict[str, Sum]:
    """The sums of each product, by what it is called."""
    return {
        "the first product": lambda rows: _first_sums(trial, dtype, rows),
        "the second product": lambda rows: _second_sums(trial, dtype, rows),
    }


def stores(trial: Trial, dtype: str) -> dict[str, bool]:
    """For each of the contract's six values that could be decided on: is it stored in `dtype`?"""
    found: dict[str, bool] = {}
    for probe in (_store_of_hidden_values, _store_of_slots, _store_of_sums, _store_of_weights):
        found |= probe(trial, dtype)
    return found


def slot_sum_bits(trial: Trial, dtype: str) -> int | None:
    """Bits of the sum over a token's slots where a narrow format holds it, 8 or 11; None for a wider one."""
    return next((bits for bits in (8, 11) if _loses_beside(trial, dtype, bits)), None)


def order(trial: Trial, dtype: str) -> str:
    """How the slots of a token are summed, in words; "" where the probes do not tell."""
    found = _order_of_slots(trial, dtype)
    return f"sums the slots of a token one after the other, {found}" if found else ""


def _first_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """up = the sum, gate = GATE, and down takes GATE away again."""
    x, weight = split_terms(rows)
    x = torch.nn.functional.pad(x, (0, 16))
    x[:, -1] = 1.0
    gate_up, down = torch.zeros(1, 32, x.shape[1]), torch.zeros(1, x.shape[1], 16)
    gate_up[0, 0, -1], gate_up[0, 16, :TERMS] = GATE, weight
    down[0, 0, 0] = 1 / GATE
    return _layer(trial, dtype, x, gate_up, down)


def _second_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """Each term is one intermediate column: gate = GATE, up = factor / GATE, so the activation is the factor."""
    x, weight = split_terms(rows)
    x = torch.nn.functional.pad(x, (0, 16))
    x[:, -1] = 1.0
    gate_up, down = torch.zeros(1, 2 * TERMS, x.shape[1]), torch.zeros(1, x.shape[1], TERMS)
    gate_up[0, :TERMS, -1] = GATE
    gate_up[0, TERMS:, :TERMS] = torch.eye(TERMS) / GATE
    down[0, 0] = weight
    return _layer(trial, dtype, x, gate_up, down)


def _layer(trial: Trial, dtype: str, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    rows = len(x)
    return _run_experts(trial, dtype, x, gate_up, down, torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int64))


def _store_of_hidden_values(trial: Trial, dtype: str) -> dict[str, bool]:
    """gate_up: gate = P + 1, up = 3.  activation: gate = P - 1, up = 3, of which 3 P - 3 is stored as 3 P - 4."""
    power = 2.0 ** BITS[dtype]
    x = torch.zeros(2, 16)
    x[0, :2], x[1, 2] = 1.0, 1.0
    x[:, 3] = 1.0
    gate_up, down = torch.zeros(1, 32, 16), torch.zeros(1, 16, 16)
    gate, up = gate_up[0, :16], gate_up[0, 16:]
    gate[0, 0], gate[0, 1], gate[0, 2] = power, 1.0, power - 1
    gate[1, 0], gate[1, 2] = power, 0.75 * power - 1
    up[0, 3], up[1, 0], up[1, 2] = 3.0, 3.0, 4.0
    down[0, 0, 0], down[0, 0, 1] = 1.0, -1.0
    got = _layer(trial, dtype, x, gate_up, down)
    if got is None:
        return {}
    first, second = got.tolist()
    found = {"gate_up": first == 0.0} if first in (0.0, 3.0, 4.0) else {}
    return found | ({"activation": second == 0.0} if second in (0.0, 1.0) else {})


def _store_of_slots(trial: Trial, dtype: str) -> dict[str, bool]:
    """expert_output: o = P + 1 with weights 3.  weighted: o = P - 1 with weight 3, in either order of two slots."""
    power = 2.0 ** BITS[dtype]
    found = {}
    one = _slots(trial, dtype, [((power, 1.0), 3.0), ((power, 0.0), -3.0)])
    if one is not None and bool((one == one[0]).all()) and float(one[0]) in (0.0, 3.0, 4.0):
        found["expert_output"] = float(one[0]) == 0.0
    elif one is not None and set(one.tolist()) <= {0.0, 3.0, 4.0}:
        found["expert_output"] = bool((one == 0).all())
    two = _slots(trial, dtype, [((power - 1, 0.0), 3.0), ((0.75 * power - 1, 0.0), -4.0)])
    if two is not None and set(two.tolist()) <= {0.0, 1.0}:
        found["weighted"] = bool((two == 0).all())
    return found


def _store_of_sums(trial: Trial, dtype: str) -> dict[str, bool]:
    lost = _loses_beside(trial, dtype, BITS[dtype])
    return {} if lost is None else {"partial_sum": lost}


def _loses_beside(trial: Trial, dtype: str, bits: int) -> bool | None:
    """P = 2^bits, 1 and -P: in an order that adds the first two first, a sum of so many bits loses the 1."""
    large = 2.0**bits
    got = _slots(trial, dtype, [((large, 0.0), 1.0), ((1.0, 0.0), 1.0), ((-large, 0.0), 1.0)])
    if got is None or not set(got.tolist()) <= {0.0, 1.0}:
        return None
    return not bool((got == 1).all())


def _store_of_weights(trial: Trial, dtype: str) -> dict[str, bool]:
    """w = (P + 1) / P with o = 3 P."""
    power = 2.0 ** BITS[dtype]
    got = _slots(trial, dtype, [((3 * power / 4, 0.0), 4 * (power + 1) / power), ((3 * power / 4, 0.0), -4.0)])
    if got is None or not set(got.tolist()) <= {0.0, 3.0, 4.0}:
        return {}
    return {"routing_weight": bool((got == 0).all())}


def _order_of_slots(trial: Trial, dtype: str) -> str | None:
    """Which of three slots comes last: there the 1 of L, 1, -L survives in an fp32 sum."""
    large = 2.0**26
    if dtype == "fp16":  # L does not fit into an expert's output in fp16
        return None
    values = [((large, 0.0), 1.0), ((1.0, 0.0), 1.0), ((-large, 0.0), 1.0)]
    by_slot = _slots(trial, dtype, values)
    by_expert = _slots(trial, dtype, values, descending=True)
    if by_slot is None or by_expert is None:
        return None
    last = [order[-1] == 1 for order in permutations(range(3))]
    first = [order[0] == 1 for order in permutations(range(3))]
    seen = (by_slot == 1).tolist(), (by_expert == 1).tolist()
    orders = {(True, True): "in their order", (False, False): "from the last to the first"}
    for (forward, also), words in orders.items():
        if seen == (last if forward else first, last if also else first):
            return words
    by_id = {(tuple(last), tuple(first)): "by ascending expert", (tuple(first), tuple(last)): "by descending expert"}
    return by_id.get((tuple(seen[0]), tuple(seen[1])))


def _slots(
    trial: Trial, dtype: str, values: Sequence[tuple[tuple[float, float], float]], descending: bool = False
) -> Tensor | None:
    """A token per order of `values` ((two terms of the expert's output), weight): slots and experts in that order.

    With `descending` the experts' numbers fall while the slots go up.
    """
    orders = list(permutations(range(len(values))))
    count = len(values)
    experts = len(orders) * count
    x, gate_up, down = torch.zeros(len(orders), 16), torch.zeros(experts, 32, 16), torch.zeros(experts, 16, 16)
    x[:, 0] = 1.0
    gate_up[:, :2, 0], gate_up[:, 16:18, 0] = GATE, 1 / GATE
    weights, ids = torch.zeros(len(orders), count), torch.zeros(len(orders), count, dtype=torch.int64)
    for token, order in enumerate(orders):
        for slot, which in enumerate(order):
            expert = token * count + (count - 1 - slot if descending else slot)
            (down[expert, 0, 0], down[expert, 0, 1]), weights[token, slot] = values[which]
            ids[token, slot] = expert
    return _run_experts(trial, dtype, x, gate_up, down, weights, ids)


def _run_experts(
    trial: Trial, dtype: str, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> Tensor | None:
    case = ExpertsCase(T=len(x), H=x.shape[1], I=down.shape[2], E=len(down), k=ids.shape[1], dtype=dtype, optional=True)
    args = {
        "hidden_states": x,
        "gate_up_proj": gate_up,
        "down_proj": down,
        "topk_weights": weights,
        "topk_ids": ids,
    }
    return first_column(trial, case, args, {"activation": "silu", "expert_map": None})
