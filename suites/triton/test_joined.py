"""What a decoding step joins: the same numbers as its stages one by one, and nothing of a pad row or a masked slot."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.harness.stages.rms_norm.bound import rms_norm_bound
from moe_harness.impls.qwen3_moe.model import load_model
from moe_harness.impls.qwen3_moe.outputs import BySlot
from moe_harness.impls.qwen3_moe.runner import Filled
from moe_harness.impls.triton._combine import combine
from moe_harness.impls.triton.experts import experts, experts_by_slot
from moe_harness.impls.triton.paged_attention import paged_attention, paged_attention_of_step
from moe_harness.impls.triton.projection import MEASURED, Plan, projection, run
from moe_harness.impls.triton.rms_norm import norm_of_parts, rms_norm
from moe_harness.impls.triton.rope_cache import rope_cache, rope_cache_of_step
from moe_harness.impls.triton.router import router, router_from_hidden
from moe_harness.impls.triton.sum_norm import sum_norm
from moe_harness.reference.model import Model as Reference
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable
EPS = 1e-6


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*size: int) -> Tensor:
    return torch.randint(-3, 4, size, generator=torch.Generator().manual_seed(sum(size))).float().to(DEVICE)


def batch(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and ids, the last slot of every token masked."""
    weights, ids = normal(tokens, num_experts, seed=1).softmax(-1).topk(top_k)
    ids[:, -1] = -1
    return weights, ids


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 32), (5, 48), (3, 7)])
def test_the_sum_of_the_experts_joins_the_norm(tokens: int, hidden: int) -> None:
    """On small integers the sum is exact, and equal bit for bit to that of two launches; the norm of it is bounded."""
    _, ids = batch(tokens, 8, 3)
    y, residual, weights = integers(tokens * 3, hidden), integers(tokens, 2 * hidden)[:, ::2], integers(tokens, 3)
    weight = normal(hidden, seed=4)
    y[2::3] = torch.nan  # of masked slots
    weights[:, -1] = torch.nan
    out, total = sum_norm(y, weights, ids, residual, weight, num_experts=8, eps=EPS)
    experts_sum = combine(y, weights, ids, 8, None)
    assert torch.equal(total, experts_sum + residual)
    bound, _ = rms_norm_bound(experts_sum, weight, eps=EPS, residual=residual, rounds=frozenset())
    assert bound.z(out).abs().max() <= bounds.max_limit()


def test_rows_by_slot_are_what_the_experts_sum() -> None:
    weights, ids = batch(6, 4, 2)
    x, up, down = normal(6, 32, seed=5), normal(4, 32, 32, seed=6), normal(4, 32, 16, seed=7)
    y = experts_by_slot(x, up, down, ids, activation="silu")
    assert torch.equal(combine(y, weights, ids, 4, None), experts(x, up, down, weights, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gate_joins_the_routing(dtype: torch.dtype) -> None:
    """Small integers have exact logits; a pad row with NaN gets no expert and spoils no other."""
    draw = torch.Generator().manual_seed(8)
    x = torch.randint(-2, 3, (9, 300), generator=draw).to(DEVICE, dtype)
    gate = torch.randint(-2, 3, (12, 300), generator=draw).to(DEVICE, dtype) * 2.0**-4
    pads = torch.tensor([4, -1, 0, 1, 2, -1, 3, 5, 6], device=DEVICE)
    logits = (x.double() @ gate.double().T).to(dtype)
    x[pads < 0] = torch.nan
    weights, ids = router_from_hidden(x, gate, pads=pads, rounded=True, top_k=3)
    wanted = router(logits.float(), top_k=3)
    live = pads >= 0
    assert torch.equal(weights[live], wanted[0][live])
    assert torch.equal(ids[live], wanted[1][live])
    assert (ids[~live] == -1).all()


PLANS = [
    Plan(16, 16, 32, 2, 4, 2, False), Plan(16, 16, 64, 1, 4, 1, True), Plan(16, 32, 32, 2, 4, 2, True),
    Plan(16, 64, 32, 2, 4, 2, True, swap=True), *MEASURED,
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan)))
@pytest.mark.parametrize(("rows", "columns", "depth"), [(3, 40, 128), (18, 33, 100)])
def test_parts_add_up_to_the_product(plan: Plan, rows: int, columns: int, depth: int) -> None:
    """Small integers have exact products; sizes that fill no tile, and operands that are not contiguous."""
    x, weight = integers(rows, 2 * depth)[:, ::2].bfloat16(), integers(depth, columns).T.bfloat16()
    if CUDA:
        torch.cuda.synchronize()  # weights are read before the kernel before has ended
    parts = run((x, weight), plan)
    assert parts.shape == (-(-depth // (plan.depth * plan.steps)), rows, columns)
    assert torch.equal(parts.sum(0).double(), x.double() @ weight.double().T)


def test_the_next_norm_adds_the_parts_up() -> None:
    """Bit for bit what it is of their sum."""
    parts, residual, weight = integers(3, 5, 48), integers(5, 96)[:, ::2].bfloat16(), normal(48, seed=9).bfloat16()
    wanted = rms_norm(parts.sum(0).bfloat16(), weight, eps=EPS, residual=residual)
    for got, by_itself in zip(norm_of_parts(parts, weight, residual, eps=EPS), wanted, strict=True):
        assert torch.equal(got, by_itself)


def test_what_reads_the_batch_early_gives_the_same_bits() -> None:
    """Rotation and attention of a step, with a pad row and an empty sequence."""
    q, k, v = normal(4, 4, 16, seed=10), normal(4, 2, 16, seed=11), normal(4, 2, 16, seed=12)
    positions, slots = torch.tensor([3, 0, 9, 5], device=DEVICE), torch.tensor([4, -1, 0, 7], device=DEVICE)
    tables, lengths = torch.tensor([[1], [0], [0], [1]], device=DEVICE), torch.tensor([2, 0, 1, 4], device=DEVICE)
    starts, found = torch.arange(5, device=DEVICE), []
    for turn, attend in ((rope_cache, paged_attention), (rope_cache_of_step, paged_attention_of_step)):
        keys, values = torch.zeros(2, 2, 4, 2, 16, device=DEVICE)
        out = turn(q, k, v, positions, slots, keys, values, eps=EPS, theta=1e4)
        mixed = attend(out, keys, values, tables, starts, lengths, scale=0.25)
        found.append(torch.cat([t.flatten() for t in (out, keys, values, mixed)]))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    x, scale = normal(2, 32, seed=1), normal(32, seed=3)
    with pytest.raises(ValueError, match=r"but should be \[T, K\], \[N, K\]"):
        projection(x, normal(8, 16, seed=4))
    with pytest.raises(ValueError, match="parts are torch.float32"):
        norm_of_parts(x, scale, x, eps=EPS)


def test_a_padded_step_gives_the_right_logits(tmp_path: Path) -> None:
    """Only a step for a graph joins anything."""
    keys = checkpoints.config("qwen3_moe", num_hidden_layers=2)
    folder = checkpoints.make(tmp_path, "qwen3_moe", dtype=torch.float32, num_hidden_layers=2)
    model = load_model(
        folder, device=DEVICE, dtype="fp32", kernels="triton", graphs=False, page_size=4, max_sequences=6,
        max_tokens=16, pages=60, max_length=80,
    )  # fmt: skip
    engine, runner = model.engine, model.engine.runner
    engine.add(model.requests([[5, 6, 7]], 4)[0])
    engine.step()
    step = engine.scheduler.plan()
    assert step is not None
    before, yielded, original = runner.last_tokens.clone(), [], model.network.sparse

    def sparse(*given):
        yielded.append(original(*given))
        return yielded[-1]

    model.network.sparse = sparse  # type: ignore[method-assign]
    ids = torch.tensor([[5, 6, 7, int(before[step.work[0].sequence.row])]])
    bound = logit_bound(Reference(keys, checkpoints.tensors(keys, dtype=torch.float32)), ids, torch.float32)
    with torch.inference_mode():
        runner.run(runner.builder.carry(step))
        assert not any(isinstance(out, BySlot) for out in yielded)
        runner.last_tokens.copy_(before)
        runner.builder.carry(step, 3)
        padded = runner.run(Filled(3, 3, 3, 3, cut=False), padded=True)[0]
    assert isinstance(yielded[-1], BySlot)
    logits = bound.value.clone()
    logits[0, -1] = padded[0].cpu().double()
    assert bound.routed[0, -1]
    assert bound.z(logits).abs().max() <= bounds.max_limit()
