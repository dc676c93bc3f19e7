"""Mistakes beyond a size, a number of bits or a usual layout: right otherwise, and the quick plan has a case of it.

They are judged here, in this process, on the planned cases that a word of their ids names.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.contracts import Declarations, Subject, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.stages.parallel_linear import rank_task
from moe_harness.harness.stages.parallel_linear.cases import plan as plan_layers
from moe_harness.harness.stages.parallel_linear.faults import shards

BY_LIBRARY = ("rms_norm", "rope_cache", "paged_attention", "sampler")


def right(stage: str) -> Callable[..., Any]:
    return load(stage, "torch" if stage in BY_LIBRARY else "torch:loop").function


def but(stage: str, **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """What is right, of operands that were changed: by name where they are passed so, else by place (`_0`)."""

    def kernel(*operands: Any, **options: Any) -> Any:
        given = [changes.get(f"_{place}", lambda x: x)(operand) for place, operand in enumerate(operands)]
        named = {n: changes[n](v) if n in changes and v is not None else v for n, v in options.items()}
        return right(stage)(*given, **named)

    return kernel


def cut(stage: str, change: Callable[..., None]) -> Callable[..., Any]:
    """What is right, with `change(result, *operands)` made to the (first) result."""

    def kernel(*operands: Any, **options: Any) -> Any:
        result = right(stage)(*operands, **options)
        change(result[0] if isinstance(result, tuple) else result, *operands)
        return result

    return kernel


def zero(*index: Any) -> Callable[..., None]:
    return lambda out, *operands: out.__setitem__(index, 0)


def in_memory_order(x: Tensor) -> Tensor:
    """A dense tensor of whole rows read row behind row, whatever the order of its dimensions."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    dense = reach == x.numel() and x.stride(-1) == 1
    return x.as_strided(x.shape, torch.empty(x.shape).stride()) if dense else x


def of_16_bits(table: Tensor) -> Tensor:
    return torch.where(table < 1 << 20, table.to(torch.int16).to(table.dtype) % (1 << 15), table)


def windowed(logits: Tensor, **options: Any) -> Tensor:
    kept = logits.topk(min(1024, logits.shape[1]), 1)
    return kept.indices.gather(1, right("sampler")(kept.values, **options).long()[:, None])[:, 0]


def lost_queries(out: Tensor, *operands: Any) -> None:
    start = operands[4].tolist()
    for first, last in zip(start, start[1:], strict=False):
        out[first + 256 : last] = 0


WRONG: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "norm_of_8192_columns": ("rms_norm", "H=16384", cut("rms_norm", zero(..., slice(8192, None)))),
    "norm_of_65535_rows": ("rms_norm", "lead=65601", cut("rms_norm", zero(slice(65535, None)))),
    "norm_without_an_eps_of_0": ("rms_norm", "numeric/data=tiny", but("rms_norm", eps=lambda eps: eps or 1e-6)),
    "norm_in_memory_order": ("rms_norm", "x:permuted", but("rms_norm", _0=in_memory_order)),
    "gate_in_memory_order": (
        "shared_expert_gate", "shared_output:permuted", but("shared_expert_gate", _2=in_memory_order)),
    "gate_of_four_leading_dimensions": (
        "shared_expert_gate", "lead=2x2x1x3x2x2",
        cut("shared_expert_gate", lambda out, *_: out.view(-1, out.shape[-1])[1:].fill_(0) if out.dim() > 5 else None)),
    "attention_of_128_elements": (
        "paged_attention", "D=256", but("paged_attention", _0=lambda q: q * (torch.arange(q.shape[2]) < 128))),
    "attention_of_8192_keys": (
        "paged_attention", "length=9000", but("paged_attention", _5=lambda lengths: lengths.clamp(max=8192))),
    "attention_of_256_queries": ("paged_attention", "length=530", cut("paged_attention", lost_queries)),
    "pages_of_16_bits": ("paged_attention", "length=35000", but("paged_attention", _3=of_16_bits)),
    "queries_in_memory_order": ("paged_attention", "q:permuted", but("paged_attention", _0=in_memory_order)),
    "table_of_131072_positions": (
        "rope_cache", "farther", but("rope_cache", _3=lambda positions: positions.clamp(max=131071))),
    "slots_of_16_bits": ("rope_cache", "T=65601", but("rope_cache", _4=lambda s: torch.where(s < 0, s, s % 65536))),
    "keys_in_memory_order": ("rope_cache", "k:permuted", but("rope_cache", _1=in_memory_order)),
    "seeds_as_floats": ("sampler", "vary=far", but("sampler", seeds=lambda seeds: seeds.float().long())),
    "positions_of_16_bits": ("sampler", "vary=far", but("sampler", positions=lambda p: p % 65536)),
    "a_top_k_of_minus_1_is_1": ("sampler", "edges", but("sampler", top_k=lambda k: torch.where(k < 0, 1, k))),
    "the_1024_likeliest": ("sampler", "V=4100", windowed),
    "rows_of_one_expert_up_to_16384": (
        "grouped_linear", "S=65601",
        cut("grouped_linear", lambda out, x, weight, sizes: out[16384 : int(sizes[0])].fill_(0))),
    "weights_in_memory_order": ("grouped_linear", "weight:permuted", but("grouped_linear", _1=in_memory_order)),
    "weights_of_32_slots": ("router", "k=65", cut("router", zero(..., slice(32, None)))),
    "biases_of_16_at_most": ("router", "bias=low", but("router", correction_bias=lambda b: b.clamp(-16, 16))),
    "half_of_the_groups": ("moe_block", "best=3", but(
        "moe_block", _2=lambda c: c | {"topk_group": c["n_group"] // 2} if "n_group" in c else c)),
    "scale_of_the_largest_model": (
        "moe_block", "scale=1.5", but("moe_block", _2=lambda c: c | {"routed_scaling_factor": 2.5})),
    "always_silu": ("moe_block", "gelu", but("moe_block", _2=lambda c: c | {"hidden_act": "silu"})),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_planned_case_tells_it(name: str) -> None:
    stage, word, kernel = WRONG[name]
    trial = Trial(Subject(stage, name, kernel, Declarations(), None), "cpu")
    ids = [planned.id for planned in plan(stage, Request()) if word in planned.id and planned.check != "leak"]
    answers = [judge_id(trial, case) for case in ids[:4]]
    assert any(answer.fails for answer in answers), [(a.id, a.status, a.reason) for a in answers]


def _layer(name: str, base: type = shards.Merged, **methods: Any) -> type:
    return type(name, (base,), methods)


def _in_the_order_of_arrival(self: Any, expert_id: int, shard_id: int) -> tuple[int, int]:
    return expert_id, sum(expert == expert_id for expert, _ in self.kept)


def _load_two(self: Any, expert_id: int, weight: Tensor, shard_id: int = 0) -> None:
    if shard_id < 2:
        shards.Merged.load(self, expert_id, weight, shard_id)


def _into_one_result(self: Any, x: Tensor, group_sizes: Tensor) -> Tensor:
    out = shards.Layer.__call__(self, x, group_sizes)
    self.held = getattr(self, "held", out)
    return self.held.copy_(out)


LAYERS = {
    "parts_in_the_order_of_arrival": _layer("Merged", key=_in_the_order_of_arrival),
    "two_parts": _layer("Merged", load=_load_two),
    "one_result": _layer("Column", shards.Column, __call__=_into_one_result),
}


@pytest.mark.parametrize("name", [*LAYERS, "right"])
def test_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS.get(name, shards.Merged)
    monkeypatch.setattr(rank_task, "load_checked", lambda *_: layer)
    me = Rank(0, 1, "gloo", SimpleNamespace(calls=[], started={}, failed=None, injector=None), partial)  # type: ignore[arg-type]
    found = [
        rank_task.run(me, {"impl": name, "case": planned.id}, 0).findings
        for planned in plan_layers([1], kind=layer.kind)
    ]
    assert any(found) is (name != "right")
