"""What people get wrong in a first kernel is told in words that lead to the line, also where no catalogue has it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import Declarations, Subject, load
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.process.worker import explain_id, judge_id
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.paged_attention.cases import PagedAttentionCase
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase
from moe_harness.harness.stages.router.cases import RouterCase
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase

SECONDS = 1.0  # of the search in the catalogue, which has none of these; what is asserted does not hang on it


def told(function: Callable[..., Any], case: Case) -> tuple[list[str], str]:
    """(causes, all words) of what a run prints of a failing case."""
    trial = Trial(Subject(case.stage, "first.py:kernel", function, Declarations.of(function), None), "cpu")
    name = f"{case.stage}/{'routing' if case.stage == 'router' else 'numeric'}/{case.id()}"
    judged, why = judge_id(trial, name), explain_id(trial, name, SECONDS)
    (first, *_) = judged.findings
    evidence = [f"{entry['fault']}: {entry['evidence']}" for entry in why.diagnosis]
    words = [first.message, *first.looks_like, *why.looks_like, *evidence]
    return [entry["fault"] for entry in why.diagnosis], "\n".join(words)


# Routers that stay in 16 bits, as torch does where nothing is cast ---------------------------------------------------


def in_the_dtype_of_the_logits(logits: Tensor, scores: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """From scores to weights as Megatron Core and vLLM go on: what is 16 bits stays so."""
    bias, groups, best = (options.get(name) for name in ("correction_bias", "num_expert_group", "topk_group"))
    chosen_on = scores if bias is None else scores + bias
    if groups is not None:
        grouped = chosen_on.unflatten(-1, (groups, -1))
        worth = grouped.topk(1 if bias is None else 2, -1).values.sum(-1)
        out = torch.ones_like(worth, dtype=torch.bool).scatter(-1, worth.topk(best, -1).indices, False)
        chosen_on = grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
    ids = chosen_on.topk(options["top_k"], -1).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) if options.get("renormalize", True) else weights
    return weights * options.get("routed_scaling_factor", 1.0), ids


def narrow_sigmoid(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    if options.get("scoring") == "sigmoid":
        return in_the_dtype_of_the_logits(logits, logits.float().sigmoid().to(logits.dtype), options)
    return in_the_dtype_of_the_logits(logits, logits.float().softmax(-1), options)


def narrow_scores(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if options.get("scoring") == "softmax" else logits.sigmoid()
    return in_the_dtype_of_the_logits(logits, scores, options)


DEEPSEEK = RouterCase(T=33, E=256, k=8, dtype="bf16", scoring="sigmoid", bias="small", groups="8x4", scale=2.5, seed=62)


@pytest.mark.parametrize(
    ("router", "case", "cause"),
    [
        (narrow_sigmoid, DEEPSEEK, "sigmoid_weights_in_logit_dtype"),
        (narrow_scores, RouterCase(T=33, E=64, k=6, dtype="bf16", groups="8x3", scale=16.0), "weights_in_logit_dtype"),
    ],
)
def test_a_router_that_stays_in_the_dtype_of_the_logits_is_told(
    router: Callable[..., Any], case: Case, cause: str
) -> None:
    trial = Trial(Subject("router", router.__name__, router, Declarations.of(router), None), "cpu")
    found = explain_id(trial, f"router/routing/{case.id()}", 60.0).diagnosis
    assert [entry["fault"] for entry in found][:1] == [cause]
    assert "rounded to the logits' 16 bits" in found[0]["evidence"]


# Outputs that say nothing of how they were made ------------------------------------------------------------------

CASES = {
    "experts": ExpertsCase(dtype="bf16"), "grouped_linear": GroupedLinearCase(K=64, N=64),
    "shared_expert_gate": GateCase(),
}  # fmt: skip
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "all_zeros": torch.zeros_like,
    "all_nan": lambda like: torch.empty_like(like),  # noqa: PLW0108 - unwritten memory is poisoned while a kernel runs
    "constant_output": lambda like: torch.full_like(like, 0.5),
    "input_copied": torch.clone,
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("stage", CASES)
def test_a_plain_output_has_its_own_name_and_no_other(stage: str, name: str) -> None:
    def kernel(*args: Tensor, **options: Any) -> Tensor:
        like = args[2] if stage == "shared_expert_gate" else args[0]
        wide = args[1].shape[1] if stage == "grouped_linear" else like.shape[-1]
        return PLAIN[name](like) if like.shape[-1] == wide else like.new_zeros(len(like), wide)

    causes, words = told(kernel, CASES[stage])
    if (stage, name) != ("grouped_linear", "input_copied"):  # K is N in no other call of it
        assert causes == [name], words


def test_a_nan_that_is_computed_is_told_from_memory_that_was_left_unwritten() -> None:
    """The exponent of a scale is taken in bytes, 2^(124 - 127 + 256): most weights are infinite."""

    def kernel(x: Tensor, *call: Any, **options: Any) -> Tensor:
        return torch.zeros_like(x) * float("inf")

    causes, words = told(kernel, QuantizedCase(format="mxfp4"))
    assert causes == ["all_nan"] and "a NaN is computed" in words, words
    causes, words = told(lambda x, *call, **options: torch.empty_like(x), QuantizedCase())
    assert causes == ["all_nan"] and "look at the launch" in words, words


def test_a_router_of_zeros_has_a_name() -> None:
    def kernel(logits: Tensor, *, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
        return logits.new_zeros(len(logits), top_k), torch.arange(top_k).expand(len(logits), top_k)

    causes, words = told(kernel, RouterCase(E=16, k=4))
    assert causes == ["all_zeros"], words


def test_zeros_in_some_calls_only_are_no_kernel_that_computes_nothing() -> None:
    right = load("experts", "torch:loop").function

    def kernel(hidden: Tensor, *others: Tensor, **options: Any) -> Tensor:
        return right(hidden, *others, **options) * (len(hidden) != 7)

    causes, words = told(kernel, ExpertsCase(T=7))
    assert causes == ["all_zeros"] and "not so in every call" in words


# Arguments in another order --------------------------------------------------------------------------------------


def _swapped(hidden_states, gate_up_proj, down_proj, topk_ids, topk_weights, *, activation="silu", expert_map=None): ...
def _by_other_names(x, w13, w2, expert_ids, expert_weights, *, activation="silu", expert_map=None): ...
def _matrices(hidden_states, down_proj, gate_up_proj, topk_weights, topk_ids, *, activation="silu"): ...
def _right(x, w13, w2, routing_weights, selected_experts, *, activation="silu", expert_map=None): ...
def _one_is_unclear(x, w13, w2, weights_of_ids, w, *, activation="silu", expert_map=None): ...


@pytest.mark.parametrize("name", ["_swapped", "_by_other_names", "_matrices"])
def test_arguments_in_another_order_are_told_from_their_names(name: str) -> None:
    with pytest.raises(UsageError, match=r"another order: \w+ is the \dth|another order: down_proj is the 2nd"):
        load("experts", f"{__name__}:{name}")


@pytest.mark.parametrize("name", ["_right", "_one_is_unclear"])
def test_other_names_in_the_right_order_are_fine(name: str) -> None:
    assert load("experts", f"{__name__}:{name}")


# What follows from the right result in one way ---------------------------------------------------------------------


def softmaxed_once_more(x, gate_up, down, weights, ids, *, activation="silu", expert_map=None):
    """The router's weights are taken for logits."""
    right = load("experts", "torch:loop").function
    return right(x, gate_up, down, weights.float().softmax(-1), ids, activation=activation, expert_map=expert_map)


def divided_by_the_sum_of_twice_as_many(logits, *, top_k, scoring="softmax", **options):
    """`scores.topk(2 * k)` where it should be `topk(k)`: the candidates' sum, not that of the chosen."""
    scores = logits.float().softmax(-1)
    weights, ids = scores.topk(top_k, -1)
    return weights / scores.topk(2 * top_k, -1).values.sum(-1, keepdim=True), ids


def scaled_logits(logits, *, top_k, scoring="softmax", **options):
    """Logits over the root of their number, as scores of attention are."""
    weights, ids = (logits.float() / logits.shape[-1] ** 0.5).softmax(-1).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def heads_and_width_exchanged(*call, scale):
    """Stored with the strides of [T, D, H]."""
    out = load("paged_attention", "torch").function(*call, scale=scale)
    return out.transpose(1, 2).reshape(out.shape).contiguous()


@pytest.mark.parametrize(
    ("kernel", "case", "words"),
    [
        (softmaxed_once_more, ExpertsCase(k=3), "the weights, softmaxed once more"),
        (divided_by_the_sum_of_twice_as_many, RouterCase(E=16, k=3), "they are divided by another sum"),
        (scaled_logits, RouterCase(E=16, k=4), "to the power 0.25"),
        (heads_and_width_exchanged, PagedAttentionCase(), "its last two axes were exchanged"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_follows_from_the_right_result_is_told(kernel, case: Case, words: str) -> None:
    causes, said = told(kernel, case)
    assert not causes and words in said, f"{causes}\n{said}"


# Five mistakes that are in no catalogue --------------------------------------------------------------------------


def one_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x.float() @ gate_up.float().T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.float().T


def overwritten(x, gate_up, down, weights, ids, *, activation="silu", expert_map=None):
    """`out[tokens] =` in the loop over the experts, where it should be `+=`."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up)):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        out[tokens] = weights[tokens, slots, None].float() * one_expert(x[tokens], gate_up[expert], down[expert])
    return out.to(x.dtype)


def repeated_as_a_whole(x, gate_up, down, weights, ids, *, activation="silu", expert_map=None):
    """`x.repeat(k, 1)`, where it should be `x.repeat_interleave(k, 0)`."""
    rows, flat = x.repeat(ids.shape[1], 1), ids.flatten()
    slots = torch.stack([one_expert(row, gate_up[e], down[e]) for row, e in zip(rows, flat.tolist(), strict=True)])
    return (slots.view(*ids.shape, -1) * weights[..., None].float()).sum(1).to(x.dtype)


def from_the_storage(x, gate_up, down, weights, ids, *, activation="silu", expert_map=None):
    """`down.untyped_storage().data_ptr()`, where it should be `down.data_ptr()`."""
    down = down.as_strided(down.shape, down.stride(), 0)
    right = load("experts", "torch:loop").function
    return right(x, gate_up, down, weights, ids, activation=activation, expert_map=expert_map)


def smallest_chosen(logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
                    topk_group=None, routed_scaling_factor=1.0):  # fmt: skip
    """A sort in ascending order, of which the first k are taken."""
    scores = logits.float().softmax(-1)
    weights, ids = (of[:, :top_k] for of in scores.sort(-1))
    return weights / weights.sum(-1, keepdim=True), ids


def ends_for_starts(x, weight, group_sizes, *, bias=None):
    """`cumsum(sizes)` taken for the first row of each group, where it is the row behind its last."""
    starts = group_sizes.cumsum(0).tolist()
    out = torch.zeros(len(x), weight.shape[1], dtype=x.dtype)
    for group, (start, size) in enumerate(zip(starts, group_sizes.tolist(), strict=True)):
        rows = x[start : start + size].float() @ weight[group].float().T
        out[start : start + size] = (rows if bias is None else rows + bias[group].float()).to(x.dtype)
    return out


@pytest.mark.parametrize(
    ("kernel", "case", "words"),
    [
        (overwritten, ExpertsCase(k=3), "overwritten by another"),
        (repeated_as_a_whole, ExpertsCase(k=2), "repeated as a whole, not one by one"),
        (from_the_storage, ExpertsCase(), "once down_proj begins where its storage begins"),
        (smallest_chosen, RouterCase(E=16, k=3), "smallest"),
        (ends_for_starts, GroupedLinearCase(), "group before"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_in_no_catalogue_is_told_by_its_structure(kernel, case: Case, words: str) -> None:
    causes, said = told(kernel, case)
    assert not causes and words in said, f"{causes}\n{said}"
