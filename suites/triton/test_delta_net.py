"""The gated delta net on its kernels, from chunks to single tokens, against the fp64 reference.

The bound of an output is that of the stage `model`: runs of the reference with random roundings.  Rows of the state
begin as NaN, sequences are at different places, some steps have pad rows, and rows of one sequence are not neighbours.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import NoiseBound, noise_bound
from moe_harness.impls.qwen3_moe.kernels import Kernels
from moe_harness.impls.qwen3_moe.linear_attention import Memory
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.network import Flat
from moe_harness.impls.torch.delta_walk import delta_walk as plain_walk
from moe_harness.impls.triton.delta_step import delta_step
from moe_harness.impls.triton.delta_walk import delta_walk
from moe_harness.reference.model import Model as Reference
from moe_harness.suites.compiled import for_hopper
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable
FAMILY, LENGTH, ROWS = "qwen3_next", 9, (2, 0, 3)
# New tokens of each of three sequences in one step; those that decode come first in a step, as in the engine.
STEPS = ((3, 1, 5), (0, 4, 2), (1, 1, 1), (0, 2, 1), (0, 1, 0), (5, 0, 0))
FEW = ((3, 1, 5), (0, 4, 2), (1, 1, 0), (5, 3, 2))  # with the fewest programs, which the interpreter runs in turn
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "odd": {"linear_key_head_dim": 9, "linear_value_head_dim": 17, "linear_conv_kernel_dim": 3},
    "released": {
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    },
}  # fmt: skip
RUN = [size for size in SIZES if CUDA or size != "released"]
Function = Callable[..., Tensor]
Steps = tuple[tuple[int, ...], ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@cache
def hidden() -> Tensor:
    return torch.randn(3, LENGTH, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


@cache
def bound(size: str, dtype: torch.dtype) -> NoiseBound:
    """Of the first half of layer 0, residual included."""
    keys = checkpoints.config(FAMILY, **SIZES[size])
    reference = Reference(keys, checkpoints.tensors(keys))
    with torch.no_grad():
        return noise_bound(reference, partial(reference.attention, 0), hidden().double(), dtype)


def model_of(folder: Path, size: str, dtype: torch.dtype, step: Function | None, walk: Function) -> Model:
    """A model on torch's kernels but for these two."""
    checkpoints.make(folder, FAMILY, **SIZES[size])
    model, joined = load_model(folder, device=DEVICE, dtype=dtype, kernels="torch"), Kernels.of("triton").joined
    assert joined is not None
    joined = None if step is None else replace(joined, delta_step=step)
    model.network.kernels = replace(model.network.kernels, delta_walk=walk, joined=joined)
    return model


def batch(done: list[int], new: tuple[int, ...], pads: int) -> tuple[list[int], Flat]:
    """The sequences of a step in its order, and the step; `pads` rows hold no sequence."""
    order = sorted((s for s in range(3) if new[s]), key=lambda s: new[s] != 1)
    counts = [new[s] for s in order] + [1] * pads
    positions = [p for s in order for p in range(done[s], done[s] + new[s])] + [0] * pads
    rows = torch.tensor([ROWS[s] for s in order] + [4] * pads)
    start = torch.tensor([0, *counts]).cumsum(0).int()
    decoding = sum(count == 1 for count in counts)
    slots, context = torch.arange(len(positions)).int(), torch.tensor(counts).int()  # which nobody looks at
    given = (torch.tensor(positions).int(), slots, start, context, torch.zeros(len(counts), 1).int())
    positions_, *others = (part.to(DEVICE) for part in given)
    return order, Flat(positions_, *others, decoding, padded=pads > 0, rows=rows.to(DEVICE))


@torch.inference_mode()
def worst(model: Model, size: str, dtype: torch.dtype, steps: Steps = STEPS, pads: int = 1) -> float:
    """Largest |z| of the first half of layer 0 over all steps, `pads` rows in those of single tokens."""
    network, x = model.network, hidden().to(DEVICE, dtype)
    assert network.layout.linear is not None
    memory = Memory.empty(network.layout.linear, 4, dtype, torch.device(DEVICE))
    memory.inputs.fill_(torch.nan)
    memory.matrices.fill_(torch.nan)
    found, done = torch.full(x.shape, torch.nan, dtype=dtype), [0, 0, 0]
    for new in steps:
        behind = pads if max(new) == 1 else 0
        order, flat = batch(done, new, behind)
        rows = torch.cat([x[s, done[s] : done[s] + new[s]] for s in order] + [torch.full_like(x[0, :behind], 9.0)])
        normed = network.norm("model.layers.0.input_layernorm.weight", rows)[0]
        out = (rows + network.finished(network.mix(0, normed, flat, memory, None))).cpu()
        for s in order:
            found[s, done[s] : done[s] + new[s]], out = out[: new[s]], out[new[s] :]
            done[s] += new[s]
    assert done == [LENGTH] * 3
    return float(bound(size, dtype).z(found).abs().nan_to_num(torch.inf).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", RUN)
def test_outputs_are_within_the_bound(size: str, dtype: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, size, DTYPES[dtype], delta_step, delta_walk)
    assert worst(model, size, DTYPES[dtype]) <= bounds.max_limit()


def test_a_step_of_single_tokens_is_one_launch(tmp_path: Path) -> None:
    called = []

    def step(*given: Tensor, **options: Any) -> Tensor:
        called.append(len(given[8]))
        return delta_step(*given, **options)

    worst(model_of(tmp_path, "tiny", torch.float32, step, plain_walk), "tiny", torch.float32)
    assert called == [4, 2]  # with a pad row each


def changed(function: Function, place: int, change: Callable[[Tensor], Tensor]) -> Function:
    """`function` with one of its arguments changed; what is written into a copy is lost."""

    def call(*given: Tensor, **options: Any) -> Tensor:
        return function(*given[:place], change(given[place]), *given[place + 1 :], **options)

    return call


STEP_FAULTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "gates of another head": (1, lambda ba: ba.roll(1, -1)),
    "taps in reverse": (2, lambda weight: weight.flip(-1).contiguous()),
    "decay of another head": (3, lambda a_log: a_log.roll(1)),
    "no shift of the rate": (4, torch.zeros_like),
    "norm of one": (5, torch.ones_like),
    "inputs not kept": (6, torch.clone),
    "matrices not kept": (7, torch.clone),
    "rows of others": (8, lambda rows: rows.roll(1)),
    "a place late in the ring": (9, lambda positions: positions + 1),
}
WALK_FAULTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "query and key not told apart": (0, torch.zeros_like),
    "no decay": (3, torch.ones_like),
    "all is written": (4, torch.ones_like),
    "matrices not kept": (5, torch.clone),
    "rows of others": (6, lambda rows: rows.roll(1)),
    "never begins anew": (8, lambda positions: positions + 1),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_the_bound_sees_a_fault_of_a_step(fault: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, "tiny", torch.bfloat16, changed(delta_step, *STEP_FAULTS[fault]), plain_walk)
    assert worst(model, "tiny", torch.bfloat16, FEW, 0) > bounds.max_limit()


@pytest.mark.parametrize("fault", WALK_FAULTS)
def test_the_bound_sees_a_fault_of_the_walk(fault: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, "tiny", torch.bfloat16, None, changed(plain_walk, *WALK_FAULTS[fault]))
    assert worst(model, "tiny", torch.bfloat16, FEW, 0) > bounds.max_limit()


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    given = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 6, 5), torch.zeros(2, 6), torch.zeros(2, 6)]
    given += [torch.zeros(1, 6, 4, 5), torch.zeros(1).long(), torch.tensor([0, 2]), torch.tensor([0, 1])]
    given = [part.to(DEVICE) for part in given]
    delta_walk(*given)
    for place, wrong, message in (
        (3, given[3][:1], "decay is"), (5, given[5][..., :4], "matrices is"), (7, given[7][:1], "query_start is"),
        (5, given[5].transpose(2, 3).contiguous().transpose(2, 3), "not contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            delta_walk(*given[:place], wrong, *given[place + 1 :])
    with pytest.raises(ValueError, match="should be fp32"):
        delta_walk(*(part.half() if part.is_floating_point() else part for part in given))


COMPILE = """
from moe_harness.impls.triton.delta_step import _step
from moe_harness.impls.triton.delta_walk import _walk
from moe_harness.impls.triton.sigmoid_gate import _gate

full, numbers = torch.empty(4096), torch.empty(64, dtype=torch.int64)
half, sizes = full.bfloat16(), dict(HEADS=32, GROUP=2, DK=128, DV=128, BK=128)
early = dict(WIDEN=False, PDL=True, launch_pdl=True)
step = (half, half, half, half, half, half, half, full, numbers, numbers, half, 1e-6, 0.088, 1, 1)
walk = (full, full, full, full, full, full, numbers, numbers, numbers, full, 1, 1, 1)
gate = (half, half, half, 4096, 4096, 256, 1, 8192, 512, 1)
for kernel in (
    _step.warmup(*step, **sizes, BV=128, K=4, **early, num_warps=8, grid=(64, 32)),
    _walk.warmup(*walk, **sizes, BV=16, num_warps=1, grid=(2, 32, 8)),
    _gate.warmup(*gate, D=256, BLOCK=1024, **early, num_warps=4, grid=(64, 4)),
):
    print(kernel.name, len(kernel.asm["cubin"]) > 0)
"""


def test_kernels_of_a_released_size_compile_for_hopper() -> None:
    assert for_hopper(COMPILE).split() == ["_step", "True", "_walk", "True", "_gate", "True"]
