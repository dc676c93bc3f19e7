"""The stage `sampler`: logits and options whose faults show, and the judgement of tokens.

A token has to be one that may be drawn, and tokens of equal distributions have to come as often as they should: every
count is judged by its binomial distribution, all counts of a distribution by Pearson's statistic, with the limits of
`bound.py`.  Whether draws at (seed, position) and its neighbours are independent is judged in the same
way, by how often the two are equal.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import NEAR_TOP_P
from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.stage import Declared, Output, Stage
from moe_harness.harness.stages.sampler.bound import count_headroom, count_headrooms, spread_headroom
from moe_harness.harness.stages.sampler.cases import APART, MANY, SamplerCase
from moe_harness.reference.sampler import probabilities

FEW_KINDS = 4  # distributions among many draws
SIDE = 64  # of the square of (seed, position)
TEMPERATURES = (0.7, 0.0, 1.3, 0.4)
TOP_K, TOP_P = (3, 0, 8, 1, 1000), (0.8, 1.0, 0.5, 0.95)
TOP_K_AT_EDGES, TOP_P_AT_EDGES = (-1, 0, -1, 1), (1.0, 1.5, 1e-6, 2.0)  # a row in two is cut to one token
TOP_K_OF_MANY, LIKELY = (100, 400, 1500, 70), 200  # tokens of nearly all weight, where top_p cuts a wide vocabulary
FAR_SEED, FAR_STEP = {"int64": 1 << 62, "int32": (1 << 31) - SIDE}, 1 << 16  # of positions


class Sampler(Stage):
    """Greedy and random choice of tokens."""

    def build(self, case: SamplerCase, device: str) -> Call:
        draw = Builder(case, device)
        temperature, top_k, top_p = _options(case)
        logits = _logits(case, draw)
        if case.cut != "none":
            logits = _clear_of_edges(case, draw, logits, temperature, top_k, top_p)
        seeds, positions = _places(case, draw)
        keywords: dict[str, Any] = {"temperature": draw.place("temperature", temperature, torch.float32)}
        args = {"logits": draw.place("logits", logits)}
        keywords["top_k"] = None if top_k is None else draw.place("top_k", top_k, INTS[case.ids])
        keywords["top_p"] = None if top_p is None else draw.place("top_p", top_p, torch.float32)
        keywords |= {n: draw.place(n, v, INTS[case.ids]) for n, v in (("seeds", seeds), ("positions", positions))}
        return Call(case, args, keywords, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        return [Output("the tokens", (len(call.args["logits"]),), (torch.int64, torch.int32))]

    def truth(self, call: Call, declared: Declared) -> None:
        """None: many tokens are right."""

    def judge(self, call: Call, result: Tensor, declared: Declared) -> Record:
        record = Record(elements=len(result))
        if not len(result):
            return record
        few, kind = _kinds(call)
        p = _drawn_from(few, few.keywords.get("top_k"))
        tokens = result.long()
        _judge_range(p, tokens, record)
        if not record.findings:
            _judge_support(call, few, kind, p, tokens, record)
        if not record.findings and call.case.data == "draws":
            _judge_counts(call, p, tokens, record)
        return record

    def telling_rows(self, call: Call) -> Tensor:
        return torch.arange(len(call.args["logits"]))


STAGE = Sampler()


def distribution(call: Call) -> Tensor:
    """What each row is drawn from, fp64 [B, V]."""
    few, kind = _kinds(call)
    return _drawn_from(few, few.keywords.get("top_k"))[kind]


def _kinds(call: Call) -> tuple[Call, Tensor]:
    """The call's different rows, and which of them each row is: many draws from few distributions repeat them."""
    logits, options = call.args["logits"], call.keywords
    told = {name: options[name] for name in ("temperature", "top_k", "top_p") if options.get(name) is not None}
    rows = torch.arange(len(logits), device=logits.device)
    if len(rows) <= FEW_KINDS or not all(
        torch.equal(tensor[FEW_KINDS:], tensor[:-FEW_KINDS]) for tensor in (*told.values(), logits)
    ):
        return call, rows
    few = {name: tensor[:FEW_KINDS] for name, tensor in told.items()}
    return call.like({"logits": logits[:FEW_KINDS]}, few), rows % FEW_KINDS


def _drawn_from(call: Call, top_k: "Tensor | None") -> Tensor:
    options = call.keywords
    return probabilities(
        call.args["logits"].double(), temperature=options["temperature"], top_k=top_k, top_p=options.get("top_p")
    )


def allowed(call: Call) -> Tensor:
    """Bool [B, V]: the tokens that may be drawn, with those that equal the least likely kept one.

    Of equal logits at the edge of top_k some or all may be kept (vLLM and transformers keep all), and the more are, the
    further top_p reaches.  At temperature 0 the largest logits are what may be drawn.
    """
    logits, top_k = call.args["logits"].double(), call.keywords.get("top_k")
    if top_k is not None and logits.numel():
        edge = logits.sort(1, descending=True).values.gather(1, top_k.long().clamp(1, logits.shape[1])[:, None] - 1)
        top_k = torch.where(top_k < 1, 0, (logits >= edge).sum(1))
    least = logits.masked_fill(_drawn_from(call, top_k) <= 0, torch.inf).amin(1, keepdim=True)
    return (logits >= least) & (logits > -torch.inf)


def _judge_range(p: Tensor, tokens: Tensor, record: Record) -> None:
    outside = (tokens < 0) | (tokens >= p.shape[1])
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        record.fail(f"row {row} is token {int(tokens[row])}, but should be in [0, {p.shape[1]})",
                    headroom=float("inf"), where={"row": row})  # fmt: skip


def _judge_support(call: Call, few: Call, kind: Tensor, p: Tensor, tokens: Tensor, record: Record) -> None:
    wrong = ~allowed(few)[kind, tokens]
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    told = {n: float(v[row]) for n in ("temperature", "top_k", "top_p") if (v := call.keywords.get(n)) is not None}
    of_row = p[kind[row]]
    options = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
    record.fail(
        f"row {row} is token {int(tokens[row])}, which cannot be drawn ({options}: {int((of_row > 0).sum())} tokens "
        f"can, the likeliest is {int(of_row.argmax())}; {int(wrong.sum())} of {len(tokens)} rows are wrong)",
        headroom=float("inf"), where={"row": row},
    )  # fmt: skip


def _judge_counts(call: Call, p: Tensor, tokens: Tensor, record: Record) -> None:
    """Counts of each distribution among the rows, and of equal neighbours on the square of (seed, position)."""
    for kind in range(FEW_KINDS):
        if float(p[kind].max()) >= 1:
            continue
        of_kind = tokens[kind::FEW_KINDS]
        draws, rows = len(of_kind), f"rows {kind}, {kind + FEW_KINDS}, ..."
        counts = torch.bincount(of_kind, minlength=p.shape[1]).double()
        used = count_headrooms(counts, draws, p[kind])
        worst = int(used.argmax())
        told = (
            f"was drawn {int(counts[worst])} times of {draws}, but should be {float(p[kind, worst]) * draws:.1f} times"
        )
        _tell(record, float(used[worst]), f"token {worst} {told} ({rows})", {"token": worst})
        for name, group in _groups(p[kind]).items():
            share, count = float(p[kind, group].sum()), int(counts[group].sum())
            told = f"{name} were drawn {count} times of {draws}, but should be {share * draws:.1f} times ({rows})"
            _tell(record, count_headroom(count, draws, share), told, {"tokens": name})
        together = spread_headroom(counts, draws, p[kind])
        _tell(record, together, f"taken together, the counts of all tokens are too far off ({rows})", {"rows": kind})
    if isinstance(call.case, SamplerCase) and call.case.vary in ("grid", "far") and not record.findings:
        _judge_neighbours(p, tokens, record)


def _groups(p: Tensor) -> dict[str, Tensor]:
    """Tokens that are judged together, since each of them is rare: bool [V] by name."""
    order = p.argsort()
    before = p[order].cumsum(0)
    groups = {"the first half of the tokens": torch.arange(len(p)) < len(p) // 2}
    for share in (16, 4, 2):
        rare = torch.zeros(len(p), dtype=torch.bool)
        rare[order[before <= 1 / share]] = True
        groups[f"the least likely tokens, 1/{share} of all draws,"] = rare
    return groups


def _judge_neighbours(p: Tensor, tokens: Tensor, record: Record) -> None:
    """Draws of one distribution at related (seed, position) are equal as often as independent ones."""
    square = tokens[: len(tokens) // SIDE * SIDE].view(-1, SIDE)  # [seed, position]
    for kind in range(FEW_KINDS):
        chance, near = float(p[kind].square().sum()), square[:, kind::FEW_KINDS]  # at positions in a row (`_position`)
        if chance >= 1 or len(near) < SIDE:
            continue
        side = near.shape[1]
        lattice = near[kind * side : (kind + 1) * side]  # [seed, position], the same numbers of both
        above = torch.ones_like(lattice).triu(1).bool()
        pairs = {
            "at seeds next to each other": (near[1:], near[:-1]),
            "at positions next to each other": (near[:, 1:], near[:, :-1]),
            "of equal seed + position": (near[1:, :-1], near[:-1, 1:]),
            "with seed and position exchanged": (lattice[above], lattice.T[above]),
        }
        for name, (first, second) in pairs.items():
            equal, count = int((first == second).sum()), first.numel()
            told = f"{equal} times of {count}, but independent ones would be {chance * count:.1f} times"
            _tell(record, count_headroom(equal, count, chance), f"draws {name} are equal {told}", {"draws": name})


def _tell(record: Record, used: float, message: str, where: dict[str, Any]) -> None:
    record.worst = max(record.worst, used)
    if used > 1:
        record.fail(message, headroom=used, where=where)


def _options(case: SamplerCase) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows = torch.arange(case.B)
    kind = rows % FEW_KINDS
    temperature = torch.full((case.B,), case.temperature)
    if case.temperature < 0:
        temperature = torch.tensor(TEMPERATURES)[kind]
    if case.data in ("hot", "masked_hot"):
        temperature = temperature * 1e4
    elif case.data == "cold":
        temperature = temperature * 1e-6
    top_k = torch.tensor(TOP_K)[rows % (FEW_KINDS if case.data == "draws" else len(TOP_K))]
    top_p = torch.tensor(TOP_P)[(kind + rows // FEW_KINDS * (case.data != "draws")) % FEW_KINDS]
    if _has_many(case):
        top_k = torch.tensor(TOP_K_OF_MANY)[kind]
    if case.cut == "edges":
        top_k, top_p = torch.tensor(TOP_K_AT_EDGES)[kind], torch.tensor(TOP_P_AT_EDGES)[kind]
    elif case.cut == "rows":
        top_k, top_p = torch.where(kind % 2 == 1, top_k, 0), torch.where(kind >= 2, top_p, 1.0)
    return (
        temperature,
        top_k if case.cut in ("k", "both", "rows", "edges") else None,
        (top_p if case.cut in ("p", "both", "rows", "edges") else None),
    )


def _has_many(case: SamplerCase) -> bool:
    return case.data == "draws" and case.cut != "none" and case.V > MANY


def _logits(case: SamplerCase, draw: Builder) -> Tensor:
    shape = (min(case.B, FEW_KINDS) if case.data == "draws" else case.B, case.V)
    if case.data in ("ties", "all_equal"):
        logits = draw.integers(-3, 1, shape).float() * (case.data == "ties")
    else:
        logits = draw.large_normal(*shape).float() * 1.5
    if case.data in ("masked", "masked_hot"):
        off = draw.uniform(*shape) < 0.5
        off[:, 0] = False
        logits = logits.masked_fill(off, -torch.inf)
    elif case.data == "peaked":
        logits[:, case.V // 2] += 25.0
    elif case.data == "edge_values":
        logits[::2, 0], logits[1::2, -1] = 12.0, 12.0
    if _has_many(case) and case.cut != "k":  # of more tokens no sum of probabilities would be clear of top_p
        logits = torch.where(torch.arange(case.V) % (case.V // LIKELY) == 0, logits * 0.5, -60.0)
    if case.data == "draws" and case.V > APART:  # who counts random numbers within a block never draws one of the two
        place = torch.arange(case.V)
        likely = (place == 3) | (place == 3 + (1 << (case.V - 4).bit_length() - 1))
        logits = torch.where(likely, logits * 0.1, -60.0)
    logits = logits + {"far_down": -1000.0, "large": 3000.0}.get(case.data, 0.0)
    if case.data == "draws" and case.B:
        logits = logits.repeat(-(-case.B // FEW_KINDS), 1)[: case.B]
    return logits


def _clear_of_edges(
    case: SamplerCase, draw: Builder, logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> Tensor:
    """Logits none of whose sums of probabilities lies at top_p, where the last digit would decide who is kept."""
    if top_p is None or case.data in ("ties", "all_equal"):
        return logits
    for _ in range(20):
        stored = logits.to(draw.dtype).double()
        p = probabilities(stored, temperature=temperature, top_k=top_k)
        reached = p.sort(1, descending=True).values.cumsum(1)
        near = ((reached - top_p.double()[:, None]).abs() < NEAR_TOP_P).any(1) & (top_p < 1)
        if case.data == "draws":
            near = near[:FEW_KINDS].repeat(-(-len(near) // FEW_KINDS))[: len(near)]
        if not bool(near.any()):
            break
        nudge = draw.normal(FEW_KINDS, case.V).repeat(-(-len(logits) // FEW_KINDS), 1)[: len(logits)]
        logits = torch.where(near[:, None], logits + 0.3 * nudge, logits)
    return logits


def _position(rows: Tensor) -> Tensor:
    """Positions on a square of SIDE: rows of one distribution, every fourth, have neighbouring ones."""
    column = rows % SIDE
    return column % FEW_KINDS * (SIDE // FEW_KINDS) + column // FEW_KINDS


def _places(case: SamplerCase, draw: Builder) -> tuple[Tensor, Tensor]:
    rows = torch.arange(case.B)
    if case.vary == "seeds":
        return rows + 12345, torch.full((case.B,), 7)
    if case.vary == "positions":
        return torch.full((case.B,), 42), rows
    if case.vary == "far":  # what keeps a seed as a float or 16 bits of a position draws alike
        return FAR_SEED[case.ids] + rows // SIDE, _position(rows) * FAR_STEP
    return rows // SIDE, _position(rows)
