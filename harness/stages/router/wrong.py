"""Standard wrong outputs of the stage `router`, and the data that cannot tell them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong
from moe_harness.reference import router as routing

NAMES = (
    "weights_zero", "weights_doubled", "flat_weights", "renormalisation_flipped", "other_scoring", "weights_reversed",
    "scaling_dropped", "bias_dropped", "bias_in_weights", "groups_ignored", "last_choice_next_best", "one_weight_off",
    "first_experts_chosen", "row_of_next_token",
)  # fmt: skip

EXCUSES = (
    Excuse("other_scoring", lambda c: c.data in ("negative", "far_negative"), "sigmoid(x) is exp(x) there"),
    Excuse("other_scoring", lambda c: c.data == "peaked" and c.E <= 2, "both scores are 1"),
    Excuse("renormalisation_flipped", lambda c: c.data == "peaked" and c.scoring == "softmax", "the sum is 1"),
    Excuse("last_choice_next_best", lambda c: c.data == "far_negative", "scores of 1e-9 and below are tied"),
    Excuse("one_weight_off", lambda c: c.data == "far_negative", "1e-5 is good to a roundoff of 1"),
    Excuse("one_weight_off", lambda c: c.data == "underflow", "the weights of that row are open"),
    Excuse("groups_ignored", lambda c: c.data == "negative" and c.bias != "none", "the bias alone decides"),
    Excuse("groups_ignored", lambda c: c.T == 1, "the best experts of one row are mostly in its best groups"),
    Excuse("bias_dropped", lambda c: c.data == "peaked" and c.E <= 8, "the peak outweighs any bias"),
    Excuse("row_of_next_token", lambda c: c.layout == "router_logits:expanded", "all rows are one"),
    Excuse("row_of_next_token", lambda c: c.data == "constant", "all rows are one"),
    Excuse("flat_weights", lambda c: c.data == "constant", "all scores are equal"),
    Excuse("weights_reversed", lambda c: c.data == "constant", "all scores are equal"),
    Excuse("other_scoring", lambda c: c.data == "constant", "all scores are equal"),
    Excuse("last_choice_next_best", lambda c: c.data == "constant", "all scores are equal"),
    Excuse("first_experts_chosen", lambda c: c.data == "constant", "all scores are equal"),
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call."""
    return router(call.args["router_logits"], call.keywords)


def router(logits: Tensor, options: dict[str, Any]) -> Wrong:
    """Name -> wrong (topk_weights, topk_ids), weights in fp64."""
    logits = logits.double()
    if not logits.numel():
        return {}

    def run(logits: Tensor = logits, **changes: Any) -> tuple[Tensor, Tensor]:
        return routing.router(logits, **(options | changes))

    weights, ids = run()
    found: Wrong = {
        "weights_zero": (torch.zeros_like(weights), ids),
        "weights_doubled": (2 * weights, ids),
        "one_weight_off": (_one_off(weights), ids),
    }
    found |= _changed_weights(logits, options, weights, ids) | _changed_choice(run, logits, options, weights, ids)
    return {name: found[name] for name in NAMES if name in found}


def _one_off(weights: Tensor) -> Tensor:
    off = weights.clone()
    off[len(off) // 2, 0] *= 1.01
    return off


def _changed_weights(logits: Tensor, options: dict[str, Any], weights: Tensor, ids: Tensor) -> Wrong:
    """The right experts with wrong weights."""
    experts, top_k, found = logits.shape[1], options["top_k"], {}
    scores = routing.expert_scores(logits, options["scoring"])
    keep = {"renormalize": options["renormalize"], "routed_scaling_factor": options["routed_scaling_factor"]}
    everything = options["scoring"] == "softmax" and top_k == experts  # their sum is 1 either way
    if not everything:
        flipped = keep | {"renormalize": not keep["renormalize"]}
        found["renormalisation_flipped"] = (routing.combine_weights(scores, ids, **flipped), ids)
    if top_k > 1:
        found["flat_weights"] = (weights.mean(-1, keepdim=True).expand_as(weights), ids)
        found["weights_reversed"] = (weights.flip(-1), ids)
    if top_k > 1 or not options["renormalize"]:
        other = "sigmoid" if options["scoring"] == "softmax" else "softmax"
        found["other_scoring"] = (routing.combine_weights(routing.expert_scores(logits, other), ids, **keep), ids)
    if options["routed_scaling_factor"] != 1.0:
        found["scaling_dropped"] = (weights / options["routed_scaling_factor"], ids)
    bias = options["correction_bias"]
    if bias is not None and bool(bias.any()) and (top_k > 1 or not options["renormalize"]):
        found["bias_in_weights"] = (routing.combine_weights(scores + bias.double(), ids, **keep), ids)
    return found


def _changed_choice(run: Callable, logits: Tensor, options: dict[str, Any], weights: Tensor, ids: Tensor) -> Wrong:
    """Other experts, with the weights that are right for them."""
    experts, top_k, found = logits.shape[1], options["top_k"], {}
    if top_k < experts:
        first = torch.arange(top_k, device=ids.device).expand_as(ids)
        found["first_experts_chosen"] = (_weights_for(logits, options, first), first)
    if len(logits) > 1 and top_k < experts:
        found["row_of_next_token"] = (weights.roll(1, 0), ids.roll(1, 0))
    bias, groups = options["correction_bias"], options["num_expert_group"]
    if top_k < experts and groups is None:
        further = run(top_k=top_k + 1)[1]
        chosen = torch.cat([further[:, : top_k - 1], further[:, top_k:]], dim=-1)
        found["last_choice_next_best"] = (_weights_for(logits, options, chosen), chosen)
    if bias is not None and top_k < experts and bool((bias != bias[0]).any()):
        found["bias_dropped"] = run(correction_bias=None)
    # Where a group's score is its largest, the best k experts are in the best k groups whatever is kept of the others.
    decisive = groups is not None and options["topk_group"] < (groups if bias is not None else min(groups, top_k))
    if decisive and top_k < experts:
        found["groups_ignored"] = run(num_expert_group=None, topk_group=None)
    return found


def _weights_for(logits: Tensor, options: dict[str, Any], ids: Tensor) -> Tensor:
    scores = routing.expert_scores(logits, options["scoring"])
    return routing.combine_weights(
        scores, ids, renormalize=options["renormalize"], routed_scaling_factor=options["routed_scaling_factor"]
    )
