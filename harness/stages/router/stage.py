"""The stage `router`: a choice is judged as a set, with ties and the rounding of fp32 scores allowed for.

A set of ids is right when no expert outside of it (that may be chosen) has a selection score above one inside of it by
more than the errors of both; groups likewise.  Weights are judged given the chosen ids, whatever they are.  Where the
scores of the chosen all underflow, any weight is right, as for a NaN: the contract divides 0 by 0 there, and
implementations that add an epsilon to the sum give 0.
"""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.core.findings import Finding, Record
from moe_harness.harness.core.stage import Declared, Output, Stage, Wrong
from moe_harness.harness.stages.router.bound import score_slack
from moe_harness.harness.stages.router.cases import RouterCase
from moe_harness.reference import router as reference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Router(Stage):
    """The choice of experts and their weights."""

    batched = ("router_logits",)

    def build(self, case: RouterCase, device: str) -> Call:
        draw = Builder(case, device)
        logits = _logits(case, draw)
        keywords: dict[str, Any] = {
            "top_k": case.k, "scoring": case.scoring, "renormalize": case.renorm, "correction_bias": None,
            "num_expert_group": None, "topk_group": None, "routed_scaling_factor": case.scale,
        }  # fmt: skip
        args = {"router_logits": draw.place("router_logits", logits)}
        if case.bias != "none":
            keywords["correction_bias"] = draw.place("correction_bias", _bias(case, draw), torch.float32)
        if case.groups != "none":
            keywords["num_expert_group"], keywords["topk_group"] = map(int, case.groups.split("x"))
        return Call(case, args, keywords, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        shape = (call.args["router_logits"].shape[0], call.keywords["top_k"])
        return [Output("topk_weights", shape, FLOATS), Output("topk_ids", shape, (torch.int32, torch.int64))]

    def truth(self, call: Call, declared: Declared) -> None:
        """None: a choice is judged as a set."""

    def judge(self, call: Call, result: tuple[Tensor, Tensor], declared: Declared) -> Record:
        """Judge (topk_weights, topk_ids)."""
        weights, ids = (tensor.detach() for tensor in result)
        record = Record(elements=ids.numel())
        if not ids.numel():
            return record
        _judge_form(call, ids, record)
        if not record.findings:
            truth = Selection(call)
            _judge_choice(call, truth, ids.long(), record)
            _judge_weights(call, truth, weights, ids.long(), bounds.permitted(declared), record)
        return record

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return {"token": row, "slot": column}

    def passing(self, call: Call, wrong: Wrong, declared: Declared) -> list[str]:
        """Every wrong choice is one more block of rows with the same logits."""
        if not wrong:
            return []
        weights, ids = (torch.cat(parts) for parts in zip(*wrong.values(), strict=True))
        logits = call.args["router_logits"]
        many = call.like({"router_logits": logits.repeat(len(wrong), 1)}, call.keywords)
        bad = wrong_rows(many, weights.float(), ids).view(len(wrong), -1).any(-1)
        return [name for name, rejected in zip(wrong, bad.tolist(), strict=True) if not rejected]

    def as_result(self, call: Call, wrong: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return wrong[0].float(), wrong[1]


STAGE = Router()


def wrong_rows(call: Call, weights: Tensor, ids: Tensor, declared: Declared = None) -> Tensor:
    """[T] of bool: the rows for which `compare` would find fault with distinct ids in range and their weights."""
    truth, wrong = Selection(call), torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    rows = truth.defined.nonzero()[:, 0]
    if len(rows):
        wrong[rows] = _excess(truth, rows, ids)[0] > 1
    return wrong | (_used(call, truth, weights, ids, bounds.permitted(declared))[0] > 1).any(-1)


class Selection:
    """Scores of a call in fp64 with the largest error an fp32 evaluation may have, and which groups may be chosen."""

    def __init__(self, call: Call):
        logits, keywords = call.args["router_logits"], call.keywords
        self.scores = reference.expert_scores(logits.double(), keywords["scoring"])
        self.error = score_slack(self.scores, logits, keywords["scoring"]) + bounds.FLUSHED
        bias = keywords["correction_bias"]
        self.selection = reference.selection_scores(self.scores, bias)
        self.slack = self.error + (
            0.0 if bias is None else 2 * bounds.ACCUMULATOR * (self.selection.abs() + self.error)
        )
        self.defined = logits.isfinite().all(-1) | (logits.isfinite() | (logits == -torch.inf)).all(-1)
        self.groups, self.best = keywords["num_expert_group"], keywords["topk_group"]
        if self.groups is not None and self.best is not None:
            biased = bias is not None
            self.group_scores = reference.group_scores(self.selection, self.groups, biased=biased)
            self.group_slack = self.slack.unflatten(-1, (self.groups, -1)).amax(-1) * (4 if biased else 1)
        else:
            self.groups = None

    def group_choices(self, row: int) -> list[tuple[int, ...]]:
        """Every set of groups that may be taken as the best ones of a row; almost always one."""
        scores, span = self.group_scores[row].tolist(), float(self.group_slack[row].max()) * 2
        limit = sorted(scores)[-self.best]
        sure = [g for g, score in enumerate(scores) if score > limit + span]
        maybe = [g for g, score in enumerate(scores) if abs(score - limit) <= span]
        return [tuple(sure) + more for more in combinations(maybe, self.best - len(sure))][:4096]

    def excess(self, rows: Tensor, ids: Tensor, open_to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far the best expert left out beats the worst one chosen, in units of what rounding explains.

        `open_to` [rows, E] says who may be chosen.  Returns (excess [rows], left out [rows], chosen slot [rows]).
        """
        selection, slack = self.selection[rows], self.slack[rows]
        chosen = torch.zeros_like(selection, dtype=torch.bool).scatter(-1, ids, True)
        outside = selection.masked_fill(chosen | ~open_to, -torch.inf)
        # The most favourable reading: who is left out at its lowest, who is chosen at its highest.
        out_value, out_id = (outside - slack).max(-1)
        inside = torch.where(open_to.gather(-1, ids), selection.gather(-1, ids) + slack.gather(-1, ids), -torch.inf)
        in_value, in_slot = inside.min(-1)
        gap = out_value - in_value
        unit = slack.gather(-1, out_id[:, None])[:, 0] + slack.gather(-1, ids).gather(-1, in_slot[:, None])[:, 0]
        excess = torch.where(gap > 0, 1 + gap / unit, (1 + gap / unit).clamp(min=0.0))
        return excess.nan_to_num(nan=0.0, posinf=1e30, neginf=0.0), out_id, in_slot


def _judge_form(call: Call, ids: Tensor, record: Record) -> None:
    experts = call.args["router_logits"].shape[1]
    outside = (ids < 0) | (ids >= experts)
    if bool(outside.any()):
        row, slot = outside.nonzero()[0].tolist()
        record.fail(f"topk_ids[{row}, {slot}] is {int(ids[row, slot])}, but should be in [0, {experts})",
                    headroom=float("inf"), where=_where(row, slot, ids))  # fmt: skip
        return
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if bool(repeated.any()):
        row = int(repeated.nonzero()[0])
        record.fail(f"topk_ids[{row}] is {ids[row].tolist()}, but its ids should be distinct",
                    headroom=float("inf"), where=_where(row, None, ids))  # fmt: skip


def _judge_choice(call: Call, truth: Selection, ids: Tensor, record: Record) -> None:
    rows = truth.defined.nonzero()[:, 0]
    if not len(rows):
        return
    excess, left_out, slot, open_to = _excess(truth, rows, ids)
    worst = int(excess.argmax())
    record.worst = max(record.worst, float(excess[worst]))
    if float(excess[worst]) <= 1:
        return
    row = int(rows[worst])
    record.add(_wrong_choice(truth, row, ids, int(left_out[worst]), int(slot[worst]), excess, open_to[worst]))


def _excess(truth: Selection, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `Selection.excess` for the choice of groups that explains each row best, and who may be chosen there."""
    everyone = torch.ones_like(truth.selection[rows], dtype=torch.bool)
    open_to = everyone if truth.groups is None else _first_choice(truth, rows)
    excess, left_out, slot = truth.excess(rows, ids[rows], open_to)
    if truth.groups is not None:
        _try_other_groups(truth, rows, ids, excess)
    return excess, left_out, slot, open_to


def _first_choice(truth: Selection, rows: Tensor) -> Tensor:
    best = truth.group_scores[rows].topk(truth.best).indices
    allowed = torch.zeros_like(truth.group_scores[rows], dtype=torch.bool).scatter(-1, best, True)
    return allowed.repeat_interleave(truth.selection.shape[-1] // truth.groups, dim=-1)


def _try_other_groups(truth: Selection, rows: Tensor, ids: Tensor, excess: Tensor) -> None:
    """Where the first choice of groups does not explain a row, try every other that rounding allows."""
    size = truth.selection.shape[-1] // truth.groups
    for place in (excess > 1).nonzero()[:, 0].tolist():
        row = int(rows[place])
        choices = truth.group_choices(row)[:64]
        for choice in choices if len(choices) > 1 else ():
            allowed = torch.zeros(1, truth.groups, dtype=torch.bool, device=ids.device)
            allowed[0, list(choice)] = True
            again, _, _ = truth.excess(
                rows[place : place + 1], ids[row : row + 1], allowed.repeat_interleave(size, dim=-1)
            )
            excess[place] = torch.minimum(excess[place], again[0])


def _wrong_choice(
    truth: Selection, row: int, ids: Tensor, left_out: int, slot: int, excess: Tensor, open_to: Tensor
) -> Finding:
    chosen = int(ids[row, slot])
    wrong = int((excess > 1).sum())
    told = f"row {row} chose expert {chosen} (selection score {float(truth.selection[row, chosen]):.7g}"
    if not bool(open_to[chosen]):
        told += ", in a group that is not among the best"
    told += (
        f") and left out expert {left_out} ({float(truth.selection[row, left_out]):.7g}); {wrong} of {len(excess)} rows"
    )
    looks = []
    if bool((truth.scores[row, ids[row]].argsort(descending=True) == 0).any()) and truth.groups is not None:
        in_groups = sorted({int(i) * truth.groups // truth.selection.shape[-1] for i in ids[row]})
        looks.append(f"groups of the chosen experts: {in_groups}, group scores {_short(truth.group_scores[row])}")
    if truth.groups is None and _chose_smallest(truth, ids):
        looks.append("every row chose its smallest scores: they are sorted in ascending order")
    return Finding(told, float(excess.max()), _where(row, slot, ids), looks)


def _chose_smallest(truth: Selection, ids: Tensor) -> bool:
    smallest = truth.selection.topk(ids.shape[-1], largest=False).indices
    return torch.equal(smallest.sort(-1).values[truth.defined], ids.sort(-1).values[truth.defined])


def _used(
    call: Call, truth: Selection, weights: Tensor, ids: Tensor, rounds: frozenset[str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share of its bound that each weight's error uses, the values, the bounds, and which are judged; all [T, k]."""
    keywords = call.keywords
    scores = truth.scores.gather(-1, ids)
    relative = (truth.error / truth.scores.clamp(min=bounds.FLUSHED)).gather(-1, ids)
    value = reference.combine_weights(
        truth.scores, ids, renormalize=keywords["renormalize"], routed_scaling_factor=keywords["routed_scaling_factor"]
    )
    bound = value * (relative + 4 * bounds.ACCUMULATOR)
    if keywords["renormalize"]:  # the error of the sum is at most that of its terms, and one roundoff for each addition
        of_sum = (scores * relative).sum(-1, keepdim=True) / scores.sum(-1, keepdim=True).clamp(min=bounds.FLUSHED)
        bound = bound + value * (of_sum + ids.shape[-1] * bounds.ACCUMULATOR)
    bound = (
        bound + bounds.ulp(value, weights.dtype) * bounds.STORED + bounds.FLUSHED * keywords["routed_scaling_factor"]
    )
    if "routing_weight" in rounds:  # to the dtype of the logits, and handed over in another one
        dtype, scale = call.args["router_logits"].dtype, keywords["routed_scaling_factor"]
        bound = bound + bounds.rounded_once(value, dtype, scale)
    judged = truth.defined[:, None] & value.isfinite()
    if keywords["renormalize"]:  # a sum that may be 0 gives 0 / 0, or 0 where an epsilon is added
        judged &= of_sum < 0.5
    used = torch.where(judged, (weights.double() - value).abs() / bound, 0.0).nan_to_num(nan=torch.inf)
    return used, value, bound, judged


def _judge_weights(
    call: Call, truth: Selection, weights: Tensor, ids: Tensor, rounds: frozenset[str], record: Record
) -> None:
    used, value, bound, judged = _used(call, truth, weights, ids, rounds)
    record.worst = max(record.worst, float(used.max()))
    if float(used.max()) <= 1:
        return
    row, slot = divmod(int(used.argmax()), ids.shape[-1])
    got, want = float(weights[row, slot]), float(value[row, slot])
    record.add(Finding(
        f"topk_weights[{row}, {slot}] (expert {int(ids[row, slot])}) is {got:.7g}, but should be {want:.7g} within "
        f"{float(bound[row, slot]):.2g}; {int((used > 1).sum())} of {int(judged.sum()) * 1} judged weights",
        float(used.max()), _where(row, slot, ids), _weight_patterns(truth, call, weights.double(), ids, value),
    ))  # fmt: skip


def _weight_patterns(truth: Selection, call: Call, weights: Tensor, ids: Tensor, value: Tensor) -> list[str]:
    """What simple mistakes would give, compared with what was got."""
    keywords = call.keywords
    scores, scale = truth.scores.gather(-1, ids), keywords["routed_scaling_factor"]
    normal, biased = scores / scores.sum(-1, keepdim=True), truth.selection.gather(-1, ids)
    candidates = {
        "not renormalised": scores * scale,
        "renormalised, which was not asked for": normal * scale,
        "without routed_scaling_factor": value / scale,
        "scaled twice": value * scale,
        "softmax over the chosen logits only": call.args["router_logits"].double().gather(-1, ids).softmax(-1) * scale,
        "the raw logits": call.args["router_logits"].double().gather(-1, ids),
    }  # fmt: skip
    if keywords["correction_bias"] is not None:
        candidates["biased scores"] = biased * scale
        candidates["biased scores, renormalised"] = biased / biased.sum(-1, keepdim=True) * scale
    told = []
    rows = truth.defined
    for name, candidate in candidates.items():
        apart = float((candidate - value)[rows].abs().max())
        close = (weights - candidate)[rows].abs() <= 1e-2 * apart + 1e-2 * candidate[rows].abs()
        if apart > 1e-4 * float(value[rows].abs().max()) and bool(close.all()):
            told.append(f"the weights are {name}")
    return told


def _where(row: int, slot: int | None, ids: Tensor) -> dict[str, Any]:
    where: dict[str, Any] = {"token": row, "chosen": ids[row].tolist()}
    return where if slot is None else where | {"slot": slot, "expert": int(ids[row, slot])}


def _short(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]


def _logits(case: RouterCase, draw: Builder) -> Tensor:
    logits = draw.large_normal(case.T, case.E, scale=2.0)
    softmax = case.scoring == "softmax"
    middle = case.T // 2
    match case.data:
        case "negative":
            logits = logits * 0.5 - (20.0 if softmax else 6.0)
        case "far_negative":  # sigmoid(-12) is 6e-6, of which (1 + tanh) / 2 keeps a percent
            logits = logits * 0.5 - (1000.0 if softmax else 12.0)
        case "peaked" if case.T:
            logits[torch.arange(case.T), draw.integers(0, case.E, (case.T,))] += 25.0 if softmax else 8.0
        case "last":  # the last experts are chosen
            logits[:, -(case.k + 1) :] += 25.0 if softmax else 8.0
        case "ties":
            logits = (logits * 2).round() / 2
        case "constant":
            logits = torch.full_like(logits, 0.5)
        case "nan_row":
            logits[middle] = float("nan")
        case "nan_element":
            logits[middle, case.E // 2] = float("nan")
        case "underflow" if case.T:  # every sigmoid of one row is 0 in fp32, and the sum of the chosen ones too
            logits[middle] -= 120.0
        case "overflow" if case.T:  # exp(100) is infinite in fp32: inf / inf, where no maximum is subtracted first
            logits[torch.arange(case.T), draw.integers(0, case.E, (case.T,))] += 0.0 if softmax else 100.0
            logits += 100.0 if softmax else 0.0
        case "inf":
            logits[middle, case.E // 3] = float("inf")
        case "minus_inf":  # as many are left as are chosen, or more
            gone = draw.distinct(case.T, case.E, max(0, min(case.E - case.k, case.E // 2)))
            logits.scatter_(-1, gone, float("-inf"))
    return logits


def _bias(case: RouterCase, draw: Builder) -> Tensor:
    noise = draw.normal(case.E)
    spread = 0.2 if case.scoring == "sigmoid" else 0.02
    return {
        "zero": noise * 0,
        "small": noise * spread,
        "negative": noise * spread - 2.0,  # every biased score is below 0
        "low": noise * spread - 30.0,  # what is left out at -1, -8 or -16 would be chosen
        "offset": noise * spread * 0.1 + 7.0,  # GLM-5.2's biases: a bf16 there has steps of 2^-5
    }[case.bias]
