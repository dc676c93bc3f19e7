"""What the error itself says, beyond which elements are wrong.

Factors of slots, experts and rows, whole tiles, and roundings that are permitted but were not declared.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.compare import judged
from moe_harness.harness.core.contracts import permissive
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.least_squares import least_squares
from moe_harness.reference.experts import expert_steps, local_ids, routed_rows
from moe_harness.reference.router import router

BLOCKS = (128, 64, 32, 16, 8, 4)
MOST_TOKENS = 256
MOST_TIMES = 1e6  # beyond, the right rows are all but zero, and a factor says nothing
REARRANGED = 0.01  # of the largest value: 16 bits round by 2^-9
SAME_WEIGHT = 0.01  # relative: weights are drawn further apart, and a fit in bf16 tells them to about 2^-8


def looks(trial: Trial, case: Case) -> list[str]:
    """Sentences about the error of the implementation on a case; [] where it is right, refuses or breaks."""
    try:
        call = trial.build(case.once())
        out = trial.invoke(call)
    except (Rejected, Broken):
        return []
    if call.case.stage == "router" and isinstance(out, tuple):
        return related_weights(call, *out)
    if not isinstance(out, Tensor) or not out.is_floating_point() or not out.numel():
        return []
    bound = trial.stage.expect(call, None)
    if not isinstance(bound, bounds.Bound):
        return []
    return undeclared(trial, call, out) or read(call, bound, out) + rearranged(bound.value, out)


def undeclared(trial: Trial, call: Call, out: Tensor) -> list[str]:
    """The roundings that would explain a result, had they been declared as well."""
    enough = undeclared_roundings(trial, call, out)
    if enough is None:
        return []
    names = f"{', '.join(enough)}{', any one of them,' if len(enough) > 1 else ''}" if enough else "more than one more"
    return [f"a rounding that is not declared: within the bound if `rounds` held {names} as well"]


def undeclared_roundings(trial: Trial, call: Call, out: Tensor) -> list[str] | None:
    """Those of which any one would suffice, [] where it takes several; None where they explain nothing."""
    declared = trial.subject.declared.rounds
    missing = [] if declared is None else [name for name in permissive(trial.stage.name) if name not in declared]
    if call.case.data == "exact" or not missing:
        return None
    if _is_within(trial, call, out, declared) or not _is_within(trial, call, out, None):
        return None
    return [name for name in missing if _is_within(trial, call, out, (*(declared or ()), name))]


def _is_within(trial: Trial, call: Call, out: Tensor, rounds: tuple[str, ...] | None) -> bool:
    truth = trial.stage.truth(call, rounds)
    return isinstance(truth, bounds.Bound | Tensor) and not judged(trial.stage, call, truth, out).findings


def read(call: Call, bound: bounds.Bound, out: Tensor) -> list[str]:
    """All that is seen in a result."""
    value, got = (t.detach().double().reshape(-1, out.shape[-1]) for t in (bound.value, out))
    sigma = bound.variance.reshape(value.shape).sqrt()
    error = bound.flat().error(got).abs().nan_to_num(torch.inf)
    wrong = (error > bounds.max_limit() * sigma) & (value.isfinite() | got.isfinite())
    if not bool(wrong.any()):
        return []
    of_slots = slots(call, got, sigma) if call.case.stage == "experts" else []
    of_experts = tiles_of_experts(_experts_of_rows(call), wrong.any(1))
    told = [*of_slots, *([] if of_slots else ratios(value, got, sigma)), *of_experts]
    return [*told, *(sentence for sentence in tiles(wrong) if not (of_experts and "the wrong rows" in sentence))]


def rearranged(value: Tensor, got: Tensor) -> list[str]:
    """Whether every token [heads, width] of a result holds the right values in another order."""
    value, got = value.double(), got.double()
    if value.dim() < 3 or value.shape != got.shape or not value.numel() or not bool(got.isfinite().all()):
        return []
    near = REARRANGED * float(value.abs().max())
    right, mine = (t.flatten(1).sort(1).values for t in (value, got))
    if not torch.allclose(right, mine, rtol=0, atol=near):
        return []
    exchanged = value.transpose(-1, -2).reshape(value.shape)
    if torch.allclose(got, exchanged, rtol=0, atol=near):
        return ["every token holds the right values as if its last two axes were exchanged when it was stored"]
    return ["every token holds the right values, in another order of its heads or elements"]


def related_weights(call: Call, weights: Tensor, ids: Tensor) -> list[str]:
    """How the weights of a router that chose the right experts follow from the right ones: by a power and a factor."""
    if not ids.numel() or ids.shape[-1] < 3 or not weights.is_floating_point():
        return []
    wide: dict[str, Any] = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.keywords.items()}
    right, order = router(call.args["router_logits"].double(), **wide)
    same = order.sort(-1)
    mine = ids.long().sort(-1)
    if not torch.equal(same.values, mine.values.to(same.values.dtype)):
        return []
    want, got = (w.double().gather(-1, s.indices).log() for w, s in ((right, same), (weights, mine)))
    if not bool(want.isfinite().all() and got.isfinite().all()):
        return []
    off, spread = (w - w.mean(-1, keepdim=True) for w in (got, want))
    power = float((off * spread).sum() / spread.square().sum().clamp(min=1e-30))
    factor = (got - power * want).mean(-1)
    if float((off - power * spread).abs().max()) > SAME_WEIGHT or float((got - want).abs().max()) < SAME_WEIGHT:
        return []
    if abs(power - 1) > SAME_WEIGHT:
        return [f"the weights are the right ones to the power {power:.3g}, times a factor: logits are scaled"]
    low, high = float(factor.exp().min()), float(factor.exp().max())
    if high - low < SAME_WEIGHT * high:
        return [f"all weights are the right ones times {_power(high)}"]
    own = f"times a factor of its own, {low:.3g} to {high:.3g}"
    return [f"the weights of each row are the right ones {own}: they are divided by another sum"]


# ----------------------------------------------------------------------------------------------------------- slots


def slots(call: Call, got: Tensor, sigma: Tensor) -> list[str]:
    """The factors c in out[t] = sum over slots c_j w_j o_j, where they explain the tokens: lost and doubled slots."""
    ids = local_ids(call.args["topk_ids"], call.keywords["expert_map"])
    terms = _terms(call, ids)
    by_slot: dict[int, list[float]] = defaultdict(list)
    by_expert: dict[int, list[float]] = defaultdict(list)
    counted: dict[int, dict[int, float]] = {}  # token -> slot -> the weight with which it counts
    factors_of: dict[tuple[int, int], float] = {}  # of (token, slot)
    told = tokens = 0
    for token in range(min(len(ids), MOST_TOKENS)):
        live = (ids[token] >= 0).nonzero()[:, 0]
        distinct = len(ids[token][live].unique()) == len(live)
        if not len(live) or not distinct or 2 * len(live) > got.shape[1] or not bool(got[token].isfinite().all()):
            continue
        tokens += 1
        factors = _factors(terms[token, live], got[token], sigma[token])
        if factors is None:
            continue
        told += 1
        for slot, factor in zip(live.tolist(), factors, strict=True):
            counted.setdefault(token, {})[slot] = factor * float(call.args["topk_weights"][token, slot])
            factors_of[token, slot] = factor
            by_slot[slot].append(factor)
            by_expert[int(ids[token, slot])].append(factor)
    if told < tokens or not told or all(f == 1.0 for many in by_slot.values() for f in many):
        return []  # some token is no weighted sum of its experts' outputs: another kind of error
    return (
        _in_words("slot", by_slot)
        or _in_words("local expert", by_expert)
        or _as_weights_of_others(counted, call.args["topk_weights"].double())
        or _missing(factors_of, ids)
        or ["each slot counts a factor of its own"]
    )


def _missing(factors_of: dict[tuple[int, int], float], ids: Tensor) -> list[str]:
    """Where every slot counts once or not at all."""
    if set(factors_of.values()) != {0.0, 1.0}:
        return []
    lost = [place for place, factor in factors_of.items() if factor == 0.0]
    token, slot = lost[0]
    where = f"slot {slot} of token {token}, on local expert {int(ids[token, slot])}"
    return [f"{len(lost)} of {len(factors_of)} slots are missing, as {where}"]


def _as_weights_of_others(counted: dict[int, dict[int, float]], weights: Tensor) -> list[str]:
    """Whether the tokens that count otherwise do so with each other's weights, or with those of other slots."""
    found = torch.full_like(weights, torch.nan)
    for token, of_slots in counted.items():
        for slot, weight in of_slots.items():
            found[token, slot] = weight
    wrong = ((found - weights).abs() > SAME_WEIGHT * weights.abs()).any(1)
    if not bool(wrong.any()) or weights.shape[1] < 2:
        return []
    others = {
        "the slot after": weights.roll(-1, 1), "the slot before": weights.roll(1, 1),
        "the slots in reverse": weights.flip(1), "the token before": weights.roll(1, 0),
        "the token after": weights.roll(-1, 0), "token 0": weights[:1].expand_as(weights),
    }  # fmt: skip
    made = {
        "softmaxed once more": weights.softmax(-1), "squared": weights.square(),
        "divided by their sum": weights / weights.sum(-1, keepdim=True), "rooted": weights.clamp(min=0).sqrt(),
        "sorted": weights.sort(-1, descending=True).values,
    }  # fmt: skip
    sentences = {f"of {name}": other for name, other in others.items()} | {f", {n}": other for n, other in made.items()}
    for name, other in sentences.items():
        near = (found - other).abs() <= SAME_WEIGHT * other.abs()
        if bool((near | found.isnan())[wrong].all()):
            return [f"wrong tokens count their slots with the weights {name}".replace(" ,", ",")]
    return []


def _terms(call: Call, ids: Tensor) -> Tensor:
    """w_j o_j for each slot, [T, k, H] in fp64."""
    hidden, gate_up, down, weights, _ = call.args.values()
    found = torch.zeros(*ids.shape, hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for expert, tokens, places in routed_rows(ids):
        rows = hidden[tokens].double()
        steps = expert_steps(rows, gate_up[expert].double(), down[expert].double(), call.keywords["activation"])
        found[tokens, places] = weights[tokens, places, None].double() * steps.output
    return found


def _factors(terms: Tensor, got: Tensor, sigma: Tensor) -> list[float] | None:
    """Least squares in units of sigma; None where the residual is more than rounding.  Near integers are integers."""
    scale = sigma.clamp(min=float(sigma.max()) * 1e-6 + 1e-300)
    design, target = (terms / scale).T, got / scale
    if not bool(design.isfinite().all()):
        return None
    size = design.square().sum(0).sqrt()
    if float(size.min()) == 0:
        return None
    factors = least_squares(design, target)
    residual = target - design @ factors
    growth = max(1.0, float(factors.abs().max()))
    if float(residual.abs().max()) > bounds.max_limit() * growth:
        return None
    error = torch.linalg.inv(design.T @ design).diagonal().sqrt() * bounds.max_limit() * growth
    near = factors.round()
    return torch.where((factors - near).abs() <= error, near, factors).tolist()


def _in_words(kind: str, factors: dict[int, list[float]]) -> list[str]:
    """One sentence for each member whose factor is the same in all its tokens; [] where some member's is not."""
    told = []
    for member, many in sorted(factors.items()):
        middle = sorted(many)[len(many) // 2]
        if max(many) - min(many) > 0.01 * max(1.0, abs(middle)):
            return []
        if len(many) < 2 and middle not in (0.0, 1.0, 2.0):  # of one token anything is a factor
            return []
        if all(f == 1.0 for f in many):
            continue
        words = {0.0: "is missing", 2.0: "counts twice"}.get(middle, f"counts {middle:.4g} times")
        told.append(f"{kind} {member} {words} in all of its {len(many)} tokens")
    return told[:3]


# ---------------------------------------------------------------------------------------------------------- ratios


def ratios(value: Tensor, got: Tensor, sigma: Tensor) -> list[str]:
    """Rows that are the right row times one factor, where each has another one or all have a power of two."""
    norm = (value / sigma.clamp(min=1e-300)).square().sum(1)
    product = (value * got / sigma.clamp(min=1e-300).square()).sum(1)
    usable = norm.isfinite() & product.isfinite() & (norm > 0)
    factor = torch.where(usable, product / norm, 1.0)
    growth = factor.abs().clamp(min=1.0)[:, None]
    residual = (got - factor[:, None] * value).abs()
    fits = (residual <= bounds.max_limit() * sigma * growth).all(1) & usable
    off = (factor - 1).abs() * norm.sqrt() > bounds.max_limit()
    wrong = ((got - value).abs() > bounds.max_limit() * sigma).any(1)
    if not bool(wrong.any()) or not bool((fits & off)[wrong].all()):
        return []
    found = factor[wrong]
    if float(found.abs().max()) > MOST_TIMES:
        return []
    middle, spread = float(found.median()), float(found.max() - found.min())
    if spread <= 0.01 * abs(middle):
        return [f"wrong rows are the right ones times {_power(middle)}"]
    low, high = float(found.min()), float(found.max())
    return [f"each wrong row is the right one times a factor of its own, {low:.3g} to {high:.3g}"]


def _power(factor: float) -> str:
    """`4 (2^2)`, `0.125 (2^-3)`, or the factor alone."""
    exponent = round(float(torch.tensor(abs(factor)).log2())) if factor else 0
    exact = factor and abs(abs(factor) / 2.0**exponent - 1) < 0.01 and exponent
    return f"{factor:.4g} (2^{exponent})" if exact and factor > 0 else f"{factor:.4g}"


# ----------------------------------------------------------------------------------------------------------- tiles


def tiles(wrong: Tensor) -> list[str]:
    """Whether the wrong rows or columns are whole blocks of a power of two, or the tail behind the last one."""
    told = []
    for axis, name in ((1, "rows"), (0, "columns")):
        sentence = _of_axis(wrong.any(axis), name)
        told += [sentence] if sentence else []
    return told


def tiles_of_experts(ids: Tensor | None, wrong: Tensor) -> list[str]:
    """Whether the wrong rows [T] are those that some expert has behind its last whole tile, from their ids [T, k]."""
    if ids is None or not ids.numel() or bool(wrong.all()) or not bool(wrong.any()):
        return []
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids[ids >= 0], minlength=int(ids.max()) + 1)
    starts = (ids < 0).sum() + counts.cumsum(0) - counts
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(ids)
    live, of = ids >= 0, ids.clamp(min=0)
    place = place - starts[of]
    for tile in BLOCKS:
        behind = live & (place >= counts[of] // tile * tile)
        for size, whose in ((tile, f"experts with {tile} rows and more"), (1, "every expert")):
            told = behind & (counts[of] >= size)
            if torch.equal(told.any(1), wrong) and bool((counts[of] >= tile)[told].any()):
                return [f"the wrong rows are those behind the last whole tile of {tile} among the rows of {whose}"]
    return []


def _experts_of_rows(call: Call) -> Tensor | None:
    """The experts of each row, [rows, k], -1 for none; None for a stage that has none."""
    if call.case.stage == "experts":
        return local_ids(call.args["topk_ids"], call.keywords["expert_map"])
    if call.case.stage == "grouped_linear":
        sizes = call.args["group_sizes"]
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes.long())[:, None]
    return None


def _of_axis(bad: Tensor, name: str) -> str | None:
    total, count = len(bad), int(bad.sum())
    if count in (0, total):
        return None
    tails = [b for b in BLOCKS if count == total % b and bool(bad[total - count :].all())]
    if tails:
        return f"the wrong {name} are those behind the last whole block of {' or '.join(map(str, tails))}"
    for block in BLOCKS:
        if block < total and _is_whole(bad, block) and count >= min(block, total):
            which = sorted({int(i) // block for i in bad.nonzero()[:, 0]})
            return f"the wrong {name} are whole blocks of {block}: {_short(which)}"
    return None


def _is_whole(bad: Tensor, block: int) -> bool:
    return all(bool((part == part[0]).all()) for part in bad.split(block))


def _short(numbers: Iterable[Any]) -> str:
    listed = [str(n) for n in numbers]
    return f"{', '.join(listed[:6])}{', ...' if len(listed) > 6 else ''}"
