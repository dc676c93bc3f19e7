"""The stage `experts`: data whose faults show, and the bound of a right result."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage, Truths
from moe_harness.harness.stages.experts import deep_sums, exact, partial_sums, routing
from moe_harness.harness.stages.experts.bound import experts_bound
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.reference.experts import local_ids

GATE_SCALE = 2.0  # |gate| around 1 to 4: much smaller, and silu, gelu and a swapped pair cannot be told apart


class Experts(Stage):
    """The routed experts."""

    batched = ("hidden_states", "topk_weights", "topk_ids")

    def build(self, case: ExpertsCase, device: str) -> Call:
        """The call of a case.  Masked slots carry NaN weights or large ones: neither may show."""
        draw = Builder(case, device)
        expert_map, local = routing.expert_map(case)
        topk_ids = routing.masked(case, routing.ids(case, draw), draw)
        paired = case.data == "partial_sums"
        if paired:
            topk_ids = partial_sums.pair_up(topk_ids, case.E, draw)
        topk_weights = routing.weights(case, draw)
        if case.data in ("exact", "deep_sums") or paired:
            counted = partial_sums.others(topk_ids, case.E) if paired else topk_ids  # those that add to a result
            hidden, gate_up, down, topk_weights = exact.draw(case, draw, counted, topk_weights, expert_map, local)
            if paired:
                partial_sums.cancel(case, topk_ids, gate_up, down, topk_weights)
            if case.data == "deep_sums":
                deep_sums.spread(case, hidden, gate_up, down)
        else:
            hidden, gate_up, down = _normal(case, draw, local)
            _make_special(case, hidden, gate_up, down, topk_ids, topk_weights)
        hidden_slots = (topk_ids < 0) & (draw.uniform(*topk_ids.shape) < 0.5)
        topk_weights = topk_weights.masked_fill(topk_ids < 0, 3.0).masked_fill(hidden_slots, float("nan"))
        ints = INTS[case.ints]
        args = {
            "hidden_states": draw.place("hidden_states", hidden),
            "gate_up_proj": draw.place("gate_up_proj", gate_up),
            "down_proj": draw.place("down_proj", down),
            "topk_weights": draw.place("topk_weights", topk_weights, torch.float32 if case.weights == "fp32" else None),
            "topk_ids": draw.place("topk_ids", topk_ids, ints),
        }
        placed_map = None if expert_map is None else draw.place("expert_map", expert_map, ints)
        return Call(case, args, {"activation": case.activation, "expert_map": placed_map}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        hidden = call.args["hidden_states"]
        return [Output("the result", tuple(hidden.shape), hidden.dtype)]

    def truth(self, call: Call, declared: Declared) -> Truths | None:
        case: Any = call.case
        if case.data == "deep_sums" or (case.data == "partial_sums" and partial_sums.is_exact(case, declared)):
            return self.exact_value(call)
        return super().truth(call, declared)

    def expect(self, call: Call, declared: Declared) -> bounds.Bound:
        """What a right result may be, within the permitted roundings."""
        return experts_bound(*call.args.values(), **call.keywords, declared=declared)

    def exact_value(self, call: Call) -> Tensor:
        """The only right result of an exact case, [T, H] in fp64."""
        return exact.value(*call.args.values(), **call.keywords)

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        """Where an element of the result is, in words a kernel's author uses."""
        ids = call.args["topk_ids"][row].tolist()
        where: dict[str, Any] = {"token": row, "column": column, "expert": ids}
        if call.keywords["expert_map"] is not None:
            where["local_expert"] = [int(call.keywords["expert_map"][i]) if i >= 0 else -1 for i in ids]
        return where

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        """Rows that belong together, by name: those of each expert (of the 16 with most rows, where there are many)."""
        ids = call.args["topk_ids"]
        counts = torch.bincount(ids[ids >= 0].long().flatten())
        chosen = counts.topk(min(16, len(counts))).indices.tolist() if len(counts) else []
        return {f"expert {e}": (ids == e).any(-1) for e in chosen}

    def telling_rows(self, call: Call) -> Tensor:
        """Rows with a live slot."""
        live = (local_ids(call.args["topk_ids"], call.keywords["expert_map"]) >= 0).any(-1)
        rows = super().telling_rows(call)
        return rows[live[rows]]


STAGE = Experts()


def _normal(case: ExpertsCase, draw: Builder, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = draw.large_normal(case.T, case.H)
    gate_up = draw.large_normal(len(local), 2 * case.I, case.H, scale=case.H**-0.5)
    gate_up[:, : case.I] *= GATE_SCALE
    return hidden, gate_up, draw.large_normal(len(local), case.H, case.I, scale=case.I**-0.5)


def _make_special(
    case: ExpertsCase, hidden: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
) -> None:
    """Change the drawn data in place to the special kind that the case names."""
    if case.data in ("token_nan", "token_inf"):
        hidden[case.T // 2, case.H // 3] = float(case.data.removeprefix("token_"))
    elif case.data in ("expert_nan", "expert_inf"):
        gate_up[1, :, 0] = float(case.data.removeprefix("expert_"))
        down[1, 0] = float(case.data.removeprefix("expert_"))
    elif case.data == "down_inf":  # one infinite product, so that an infinity of known sign is the only right result
        down[1, case.H // 2, case.I // 2] = float("inf")
    elif case.data == "signed_weights":
        weights[:, ::2] *= -1.0
    elif case.data == "unused_expert_nan":
        ids[ids == 2] = 0
        gate_up[2], down[2] = float("nan"), float("nan")
    elif case.data == "tiny":  # products far under 1, above the subnormals of fp16
        hidden *= 2.0**-6
        down *= 2.0**-4
    elif case.data == "huge":  # gates of about 30, hidden values of about 1000: finite in fp16 wherever they are stored
        hidden *= 16.0
        gate_up[:, case.I :] *= 2.0
    elif case.data == "outside_fp16":  # a kernel that passes through fp16 turns these into infinities and zeros
        hidden[::2] *= 2.0**17
        hidden[1::2] *= 2.0**-20
    elif case.data == "cancelling" and case.k > 1:  # slots that cancel to an eighth of their size
        gate_up[1::2] = gate_up[0::2]
        down[1::2] = -down[0::2]
        ids[:, 0], ids[:, 1] = 0, 1
        weights[:, 1] = weights[:, 0] * 0.875
