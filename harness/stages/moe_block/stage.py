"""The stage `moe_block`: one layer of each model family, on tokens whose choice of experts is not a matter of rounding.

A router in bf16 and one in fp32 choose other experts for some per cent of all tokens, and both are right.  So tokens
are drawn until the gap at the k-th expert (and at the last group) is several times what rounding of the logits
explains; ties are judged in the stage `router`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage, Truths
from moe_harness.harness.stages.experts import deep_sums, exact, partial_sums
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.moe_block.bound import block_bound
from moe_harness.harness.stages.moe_block.cases import CANCELLING, MoeBlockCase
from moe_harness.reference import moe_block as reference
from moe_harness.reference import router

# Tokens that near ties are looked for among, where the router is fp32.  Of 80, 16 tokens had none that bf16 logits send
# to another expert: such a router passed at every T up to 127.
POOL = 2048
MARGIN = 6.0  # gap over the standard error of both logits; at most 12 ulps of a bf16 logit
SHARED = {"qwen2_moe": "shared_expert", "qwen3_next": "shared_expert",
          "qwen3_5_moe_text": "shared_expert", "qwen3_omni_moe_talker_text": "shared_expert",
          "deepseek_v2": "shared_experts", "deepseek_v3": "shared_experts"}  # fmt: skip


class MoeBlock(Stage):
    """One sparse layer of a model family."""

    batched = ("hidden_states",)

    def build(self, case: MoeBlockCase, device: str) -> Call:
        draw = Builder(case, device)
        config = _config(case)
        weights = _weights(case, draw)
        if case.data in CANCELLING:
            hidden = _cancelling(case, draw, weights)
        else:
            hidden = _decided_tokens(case, draw, weights, config)
        if case.data in ("token_nan", "token_inf"):
            hidden[case.T // 2, case.H // 3] = float(case.data.removeprefix("token_"))
        args: dict[str, Any] = {"hidden_states": draw.place("hidden_states", hidden)}
        fp32 = ("gate.e_score_correction_bias",)
        args["weights"] = {n: draw.place(n, w, torch.float32 if n in fp32 else None) for n, w in weights.items()}
        return Call(case, args | {"config": config}, {}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        hidden = call.args["hidden_states"]
        return [Output("the result", tuple(hidden.shape), hidden.dtype)]

    def truth(self, call: Call, declared: Declared) -> Truths | None:
        """The value itself on data whose sums are exact: silu(g) is g in fp64 as well."""
        case, bound = _experts_case(call.case), self.expect(call, declared)
        paired = case.data == "partial_sums" and partial_sums.is_exact(case, declared)
        is_exact = paired or case.data == "deep_sums"
        return bound.value if is_exact else bound

    def expect(self, call: Call, declared: Declared) -> bounds.Bound:
        """What a right result may be; where a router in tf32 may choose other experts, anything."""
        hidden, weights, config = call.args.values()
        bound, rounds = block_bound(hidden, weights, config, declared=declared), bounds.permitted(declared)
        if not bounds.in_tf32(rounds, hidden.dtype):
            return bound
        gate = {n: w.double() for n, w in weights.items() if n.startswith("gate.")}
        return bound.open_where(_margin(hidden.double(), gate, config, hidden.dtype, rounds) <= MARGIN)

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return {"token": row, "column": column, "expert": _chosen(call)[row].tolist()}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        ids = _chosen(call)
        return {f"expert {e}": (ids == e).any(-1) for e in ids.unique().tolist()[:16]}


STAGE = MoeBlock()


def _chosen(call: Call) -> Tensor:
    hidden, weights, config = call.args.values()
    wide = {n: w.double() for n, w in weights.items() if n.startswith("gate.")}
    return reference.routing(reference.router_logits(hidden.double(), wide, config), wide, config)[1]


def _config(case: MoeBlockCase) -> dict[str, Any]:
    """The Hugging Face keys of the family; norm_topk_prob is absent where the case says "default"."""
    config = {"model_type": case.family, "num_experts_per_tok": case.k, "hidden_size": case.H, "hidden_act": case.act}
    if case.renorm != "default":
        config["norm_topk_prob"] = case.renorm == "yes"
    if case.family == "mixtral":
        return config | {"num_local_experts": case.E, "intermediate_size": case.I}
    config["moe_intermediate_size"] = case.I
    if not case.family.startswith("deepseek"):
        return config | {"num_experts": case.E, "shared_expert_intermediate_size": case.shared}
    groups = 8 if case.E >= 16 and case.E % 8 == 0 else 4 if case.E % 4 == 0 else 1
    config |= {"n_routed_experts": case.E, "n_shared_experts": 2, "n_group": groups}
    config["topk_group"] = case.best or max(1, groups // 2)
    version = case.family.removeprefix("deepseek_")
    by_group = {"v2": "group_limited_greedy", "v3": "noaux_tc"}[version]
    method = by_group if case.method == "groups" else case.method
    return config | {"topk_method": method, "routed_scaling_factor": case.scale or {"v2": 4.0, "v3": 2.5}[version]}


def _weights(case: MoeBlockCase, draw: Builder) -> dict[str, Tensor]:
    inner, hidden = case.I, case.H
    gate_up = draw.large_normal(case.E, 2 * inner, hidden, scale=hidden**-0.5)
    gate_up[:, :inner] *= 2.0
    weights = {
        "gate.weight": draw.normal(case.E, hidden, scale=2.0 * hidden**-0.5),
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": draw.large_normal(case.E, hidden, inner, scale=inner**-0.5),
    }
    if case.family == "deepseek_v3":
        weights["gate.e_score_correction_bias"] = draw.normal(case.E, scale=0.2)
    prefix = SHARED.get(case.family)
    if prefix is not None:
        width = 2 * inner if prefix == "shared_experts" else case.shared
        weights[f"{prefix}.gate_proj.weight"] = draw.normal(width, hidden, scale=2.0 * hidden**-0.5)
        weights[f"{prefix}.up_proj.weight"] = draw.normal(width, hidden, scale=hidden**-0.5)
        weights[f"{prefix}.down_proj.weight"] = draw.normal(hidden, width, scale=width**-0.5)
    if prefix == "shared_expert":
        weights["shared_expert_gate.weight"] = draw.normal(1, hidden, scale=hidden**-0.5)
    return weights


def _experts_case(case: Any) -> ExpertsCase:
    """The case of the block's routed experts."""
    sizes = {name: getattr(case, name) for name in ("T", "H", "I", "E", "k", "dtype", "data")}
    return ExpertsCase(**sizes)


def _cancelling(case: MoeBlockCase, draw: Builder, weights: dict[str, Tensor]) -> Tensor:
    """Hidden states on which a sum in 16 bits shows, over slots or over depth; `weights` are changed in place to such.

    Every expert is chosen, all with the same weight, and the shared expert adds nothing.
    """
    experts, paired = _experts_case(case), case.data == "partial_sums"
    ids = torch.arange(case.E).expand(case.T, case.E)
    counted = partial_sums.others(ids, case.E) if paired else ids
    hidden, gate_up, down, _ = exact.draw(experts, draw, counted, draw.uniform(*ids.shape), None, torch.arange(case.E))
    if paired:
        partial_sums.oppose(gate_up, down)
        down[[0, -1]] *= 2.0 ** (partial_sums.BITS[case.dtype] + 1)
    else:
        deep_sums.spread(experts, hidden, gate_up, down)
    weights |= {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    for name in weights:
        if name == "gate.weight" or name.startswith("shared") and name.endswith("down_proj.weight"):
            weights[name] = torch.zeros_like(weights[name])
    return hidden


def _decided_tokens(case: MoeBlockCase, draw: Builder, weights: dict[str, Tensor], config: dict) -> Tensor:
    """[T, H] whose experts are chosen by a clear margin; the clearest ones drawn, where too few are."""
    dtype = DTYPES[case.dtype]
    gate = {
        n: w.to(dtype).double() if n == "gate.weight" else w.double()
        for n, w in weights.items()
        if n.startswith("gate.")
    }
    in_fp32 = reference.family(config).router_in_fp32
    drawn = max(4 * case.T + 16, POOL if in_fp32 else 0)
    pool = draw.normal(drawn, case.H, scale=2.0**-6 if case.data == "tiny" else 1.0).to(dtype)
    margin = _margin(pool.double(), gate, config, dtype)
    clear = (margin > MARGIN).nonzero()[:, 0]
    if in_fp32:  # logits of 16 bits choose wrongly between near ties only
        nearest = clear[margin[clear].argsort()][: (case.T + 1) // 2]
        clear = torch.cat([nearest, clear[~torch.isin(clear, nearest)]])
    order = clear if len(clear) >= case.T else margin.argsort(descending=True)
    return pool[order[: case.T]].float()


def _margin(
    x: Tensor, gate: dict[str, Tensor], config: dict, dtype: torch.dtype, rounds: bounds.Rounds = frozenset()
) -> Tensor:
    """Smallest gap at the border of the choice, over the standard error there, [tokens]."""
    rule = reference.routing_rule(config)
    logits = reference.router_logits(x, gate, config)
    scores = router.expert_scores(logits, rule.scoring)
    selection = router.selection_scores(scores, reference.correction_bias(gate, config))
    slope = scores * (1 - scores) if rule.scoring == "sigmoid" else scores
    in_fp32 = reference.family(config).router_in_fp32
    kept_in, of_score = (torch.float32, 2.0**-24) if in_fp32 else (dtype, 2.0**-30)
    variance = bounds.store(logits, kept_in) + bounds.product_variance(x, gate["gate.weight"], rounds, dtype)
    error = slope * variance.sqrt() + of_score
    margin = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    if rule.num_expert_group is not None and rule.topk_group is not None:
        by_group = router.group_scores(selection, rule.num_expert_group, biased=rule.scoring == "sigmoid")
        of_group = error.unflatten(-1, (rule.num_expert_group, -1)).amax(-1)
        margin = _border(by_group, of_group, rule.topk_group)
        best = by_group.topk(rule.topk_group).indices
        open_to = torch.zeros_like(by_group, dtype=torch.bool).scatter(-1, best, True)
        selection = selection.masked_fill(
            ~open_to.repeat_interleave(selection.shape[-1] // rule.num_expert_group, -1), -9.0
        )
    return torch.minimum(margin, _border(selection, error, rule.top_k))


def _border(scores: Tensor, error: Tensor, count: int) -> Tensor:
    """(the last one in - the first one out) / their standard error, [tokens]."""
    if count >= scores.shape[-1]:
        return torch.full((len(scores),), torch.inf, dtype=torch.float64, device=scores.device)
    values, at = scores.topk(count + 1)
    spread = error.gather(-1, at[:, -2:]).square().sum(-1).sqrt()
    return (values[:, -2] - values[:, -1]) / spread
