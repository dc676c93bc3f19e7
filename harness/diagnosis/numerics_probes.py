r"""How an implementation computes: which values it stores in the inputs' dtype, and how it accumulates.

Every probe is exact but for the one step it asks about.  With P = 2^8 (bf16) or 2^11 (fp16), P + 1 is the first integer
the dtype cannot hold, so 3 (P + 1) = 3 P + 3 reads as
    3 P        where P + 1 was stored before it was multiplied
    3 P + 4    where the product was stored
    3 P + 3    where neither was
and subtracting 3 P makes that the result.  An accumulator of p bits loses a 1 next to 2^p: L, 1, -L sum to 0 in it.
Where two ones beside each other survive and one alone does not, both were added before they met L: in one block.
"""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import DTYPES, Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.names import DESCRIBED_STAGES
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.router.probes import of_router
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase

BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
FORMATS = {8: "bf16", 11: "fp16 or tf32", 24: "fp32", 53: "fp64"}
TERMS = 256  # length of the sums that are probed
WIDEST = 27  # bits told apart in an accumulator
FIRST = 6
SCALE = 12  # L is 2^j = 2^(j - SCALE) * 2^SCALE, so that both factors fit fp16
FEW_BORDERLINE = 2  # of 64 products, those that an fp32 sigmoid's own error may round the other way
GATE = 32.0  # silu and gelu_tanh of it are 32 in every dtype

Sum = Callable[[Tensor], Tensor | None]  # [rows, TERMS] of factors -> the sums of a row


def how_it_computes(trial: Trial) -> str:
    """A paragraph on how the implementation rounds and accumulates; only what the probes establish."""
    stage = trial.subject.stage
    if stage not in DESCRIBED_STAGES:
        return ""
    declared = trial.subject.declared.dtypes
    told: dict[str, list[str]] = {}
    for name in (n for n in ("bf16", "fp16", "fp32") if n in declared):
        sentences = of_router(trial, name) if stage == "router" else _of_dtype(trial, name)
        told.setdefault("; ".join(sentences), []).append(name)
    return " ".join(f"In {_listed(names)} it {sentences}." for sentences, names in told.items() if sentences)


def stores(trial: Trial, dtype: str) -> dict[str, bool]:
    """For each value that the probes could decide on (of experts the contract's six): is it stored in `dtype`?"""
    if dtype == "fp32":
        return {}
    if trial.subject.stage == "shared_expert_gate":
        return _store_of_logit(trial, dtype) | _store_of_gate(trial, dtype)
    if trial.subject.stage != "experts":
        return {}
    found: dict[str, bool] = {}
    for probe in (_store_of_hidden_values, _store_of_slots, _store_of_sums, _store_of_weights):
        found |= probe(trial, dtype)
    return found


def accumulators(trial: Trial, dtype: str) -> dict[str, dict[str, Any]]:
    """For each product: `bits` of its accumulator (None: more than can be told), `block`: terms summed beforehand."""
    found = {}
    for name, sums in _products(trial, dtype).items():
        bits = _width(sums)
        if bits is not None:
            found[name] = {"bits": bits if bits <= WIDEST else None, "block": _block(sums, bits)}
    return found


def slot_sum_bits(trial: Trial, dtype: str) -> int | None:
    """Bits of the sum over a token's slots where a narrow format holds it, 8 or 11; None for a wider one."""
    if trial.subject.stage != "experts":
        return None
    return next((bits for bits in (8, 11) if _loses_beside(trial, dtype, bits)), None)


def operand_bits(trial: Trial) -> int | None:
    """Bits of the significand that fp32 operands keep in the products: 24, 11 for tf32, 8 for bf16."""
    if trial.subject.stage == "shared_expert_gate":  # a sigmoid hides all but a few bits of its argument
        return None
    sums = next(iter(_products(trial, "fp32").values()))
    kept = torch.arange(1, 24)
    rows = torch.zeros(len(kept), TERMS)
    rows[:, 1], rows[:, 2] = 1 + 2.0**-kept, -1.0
    got = sums(rows)
    if got is None or not _is_kept_or_lost(got, 2.0**-kept):
        return None
    survived = got == 2.0**-kept
    return 24 if bool(survived.all()) else int(survived.int().argmin()) + 1


# ----------------------------------------------------------------------------------------------------------- words


def _of_dtype(trial: Trial, name: str) -> list[str]:
    told = _of_stores(stores(trial, name))
    sums = {product: _sum_in_words(**found) for product, found in accumulators(trial, name).items()}
    if len(set(sums.values())) == 1:
        sums = {"the products" if len(sums) > 1 else "the product": next(iter(sums.values()))}
    told += [f"accumulates {product} in {words}" for product, words in sums.items()]
    if name == "fp32":
        bits = operand_bits(trial)
        if bits is not None and bits < 24:
            told.append(f"rounds the operands of products to {bits} bits ({FORMATS.get(bits, 'an unusual format')})")
    bits = slot_sum_bits(trial, name)
    if bits is not None and bits < BITS[name]:
        told.append(f"sums the slots of a token in {_sum_in_words(bits, None)}")
    order = _order_of_slots(trial, name)
    return told + ([f"sums the slots of a token one after the other, {order}"] if order else [])


def _of_stores(found: dict[str, bool]) -> list[str]:
    words = {
        "gate_up": "gate and up",
        "activation": "the activation",
        "expert_output": "each expert's output",
        "weighted": "each weighted output",
        "partial_sum": "the running sum over the slots",
        "routing_weight": "the routing weights",
        "logit": "the logit",
        "gate": "the gate",
    }
    stored = [words[n] for n, yes in found.items() if yes]
    kept = [words[n] for n, yes in found.items() if not yes]
    told = [f"stores {_listed(stored)} in the inputs' dtype"] if stored else []
    if found and not stored:
        return ["stores no intermediate value in the inputs' dtype"]
    return told + ([f"keeps {_listed(kept)} wider"] if kept else [])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sum_in_words(bits: int | None, block: int | None) -> str:
    if bits is None:
        return f"more than {WIDEST} bits, or in an order in which none are lost"
    told = f"{FORMATS[bits]} ({bits} bits)" if bits in FORMATS else f"{bits} bits"
    if block is None:
        return told
    return f"{told}, no neighbouring terms beforehand" if block == 1 else f"{told}, {block} terms at a time"


# ---------------------------------------------------------------------------------------------------- accumulation


def _width(sums: Sum) -> int | None:
    """The smallest j at which a 1 beside 2^j is lost, wherever the 1 and -2^j stand; WIDEST + 1 where none is.

    None where a result is no such sum at all, or where 2^j leaves the accumulator's range before anything is lost.
    """
    exponents, last, half = torch.arange(FIRST, WIDEST + 1), TERMS - 1, TERMS // 2
    places = ((1, last), (half, last), (last - 1, last), (1, 2), (2, 17), (5, 3), (77, 200))
    rows = torch.zeros(len(exponents), len(places), TERMS)
    for number, (one, minus) in enumerate(places):
        rows[:, number, 0], rows[:, number, minus] = 2.0**exponents, -(2.0**exponents)
        rows[:, number, one] = 1.0
    got = sums(rows.flatten(0, 1))
    if got is None or not _is_kept_or_lost(got, 1.0) or not bool((got[: len(places)] == 1).all()):
        return None
    wrong = ((got != 1) & got.isfinite()).view(len(exponents), -1).any(1).nonzero()
    if not len(wrong):
        return WIDEST + 1 if bool(got.isfinite().all()) else None
    return FIRST + int(wrong[0])


def _is_kept_or_lost(got: Tensor, small: Tensor | float) -> bool:
    """Whether each finite sum holds `small` entire, not at all, or rounded up to twice of it."""
    return bool(((got == 0) | (got == small) | (got == 2 * small) | ~got.isfinite()).all())


def _block(sums: Sum, bits: int) -> int | None:
    """How many neighbouring terms are summed before they meet the rest; None where the pattern is no such thing."""
    if bits > WIDEST:
        return None
    pairs = torch.arange(1, TERMS - 2)
    rows = torch.zeros(len(pairs), TERMS)
    rows[:, 0], rows[:, -1] = 2.0**bits, -(2.0**bits)
    rows.scatter_(1, pairs[:, None], 1.0).scatter_(1, pairs[:, None] + 1, 1.0)
    got = sums(rows)
    if got is None:
        return None
    apart = (got == 0).nonzero()[:, 0] + 2  # index of the second one of a pair that did not survive
    if len(apart) == len(pairs):
        return 1
    together = (got != 0).nonzero()[:, 0] + 2
    borders = [int(i) for i in apart if int(together[0]) < int(i) < int(together[-1])]
    steps = {b - a for a, b in zip(borders, borders[1:], strict=False)}
    regular = len(steps) == 1 and borders[0] % min(steps) == 0
    return min(steps) if regular else None


def _products(trial: Trial, dtype: str) -> dict[str, Sum]:
    if trial.subject.stage == "shared_expert_gate":
        return {"the product": lambda rows: _gate_sums(trial, dtype, rows)}
    if trial.subject.stage == "grouped_linear":
        return {"the product": lambda rows: _linear_sums(trial, dtype, rows)}
    return {
        "the first product": lambda rows: _first_sums(trial, dtype, rows),
        "the second product": lambda rows: _second_sums(trial, dtype, rows),
    }


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of each term: [rows, TERMS] for the activations, and [TERMS] for the weights, common to all rows."""
    weight = torch.ones(TERMS)
    large = rows.abs().amax(0) >= 2.0**FIRST
    weight[large] = 2.0**SCALE
    return rows / weight, weight


def _linear_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    x, weight = _split(rows)
    case = GroupedLinearCase(S=len(x), K=TERMS, N=16, E=1, dtype=dtype, optional=True)
    args = {"x": x, "weight": torch.zeros(1, 16, TERMS), "group_sizes": torch.tensor([len(x)])}
    args["weight"][0, 0] = weight
    return _first_column(trial, case, args, {"bias": None})


def _gate_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """The logit, read back from its sigmoid; the sums asked about are small whole numbers."""
    x, weight = _split(rows)
    gate = _run_gate(trial, dtype, x, weight, 1.0)
    return None if gate is None else (gate / (1 - gate)).log().round()


def _first_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """up = the sum, gate = GATE, and down takes GATE away again."""
    x, weight = _split(rows)
    x = torch.nn.functional.pad(x, (0, 16))
    x[:, -1] = 1.0
    gate_up, down = torch.zeros(1, 32, x.shape[1]), torch.zeros(1, x.shape[1], 16)
    gate_up[0, 0, -1], gate_up[0, 16, :TERMS] = GATE, weight
    down[0, 0, 0] = 1 / GATE
    return _layer(trial, dtype, x, gate_up, down)


def _second_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    """Each term is one intermediate column: gate = GATE, up = factor / GATE, so the activation is the factor."""
    x, weight = _split(rows)
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


# ---------------------------------------------------------------------------------------------------------- stores


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


def _store_of_logit(trial: Trial, dtype: str) -> dict[str, bool]:
    """logit = -16 - d, d half an ulp: where it is stored, the gate, about exp(logit), is larger by the factor 1 + d."""
    half = 2.0 ** (4 - BITS[dtype])
    x = torch.tensor([[-16.0, -half], [-16.0, 0.0]])
    got = _run_gate(trial, dtype, torch.nn.functional.pad(x, (0, 14)), torch.ones(16), 2.0**14)
    if got is None or not bool((got > 0).all()):
        return {}
    return {"logit": bool(got[0] == got[1])}


def _store_of_gate(trial: Trial, dtype: str) -> dict[str, bool]:
    """Three times the gate, rounded once or twice: which of the two every one of 64 gates agrees with."""
    logits = torch.arange(-32, 32) / 16
    got = _run_gate(trial, dtype, torch.nn.functional.pad(logits[:, None], (0, 15)), torch.ones(16), 3.0)
    if got is None:
        return {}
    gate, kind = logits.double().sigmoid(), DTYPES[dtype]
    once, twice = ((3 * g.double()).to(kind).double() for g in (gate, gate.to(kind)))
    wrong = {True: int((got != twice).sum()), False: int((got != once).sum())}
    stored = wrong[True] < wrong[False]
    return {"gate": stored} if wrong[stored] <= FEW_BORDERLINE else {}


def _order_of_slots(trial: Trial, dtype: str) -> str | None:
    """Which of three slots comes last: there the 1 of L, 1, -L survives in an fp32 sum."""
    large = 2.0**26
    if dtype == "fp16" or trial.subject.stage != "experts":  # L does not fit into an expert's output in fp16
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


# ------------------------------------------------------------------------------------------------------------ calls


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
    return _first_column(trial, case, args, {"activation": "silu", "expert_map": None})


def _run_gate(trial: Trial, dtype: str, x: Tensor, weight: Tensor, output: float) -> Tensor | None:
    case = GateCase(lead=str(len(x)), H=x.shape[1], D=16, dtype=dtype, optional=True)
    args = {"hidden_states": x, "gate_weight": weight[None], "shared_output": torch.full((len(x), 16), output)}
    return _first_column(trial, case, args, {})


def _first_column(trial: Trial, case: Case, args: dict[str, Tensor], keywords: dict[str, Any]) -> Tensor | None:
    """Column 0 of the result, in fp64 on the CPU; None where the implementation refuses or fails."""
    call = Call(case, {}, keywords)
    for name, values in args.items():
        kind = DTYPES[case.dtype] if values.is_floating_point() and name != "topk_weights" else values.dtype
        call.args[name] = call.arena.place(name, values.to(trial.device, kind))
    try:
        return trial.invoke(call)[:, 0].double().cpu()
    except (Rejected, Broken):
        return None
