"""Faults of the experts stage that need a GPU: graphs, streams, atomics, offsets beyond 2^31.

`run_captured` is a right implementation without any synchronisation, so that it can be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import unwritten_like, wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, halves, live, locate, run

CUDA = ("cuda",)
_kept: dict[tuple[Any, ...], Tensor] = {}  # what the stateful faults keep between calls


def run_captured(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    steps: Steps = RIGHT,
) -> Tensor:
    """Gather each slot's weights and multiply them in one batch."""
    kind, ids = wide(hidden_states), locate(topk_ids, expert_map)
    chosen = ids.clamp(min=0).flatten()
    x = hidden_states.to(kind).repeat_interleave(ids.shape[1], 0)[..., None]
    gate, up = halves((gate_up_proj[chosen].to(kind) @ x).squeeze(-1))
    slots = (down_proj[chosen].to(kind) @ steps.gated(gate, up, activation)[..., None]).view(
        *ids.shape, down_proj.shape[1]
    )
    weighted = torch.where(ids[..., None] < 0, 0, live(topk_weights, ids, kind)[..., None] * slots)
    return weighted.sum(1).to(hidden_states.dtype)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@fault(
    "graph", source="flashinfer-ai/flashinfer/pull/4690", condition="replay with changed inputs", shows=None,
    devices=CUDA, graph_capturable=True, stateful=True,
)  # fmt: skip
def graph_ignores_new_inputs(*call: Tensor, **options: Any) -> Tensor:
    """The captured kernels read copies made before the capture: every replay repeats the first answer."""
    key = ("inputs", call[0].shape, call[1].shape, call[0].dtype)
    if not _capturing():
        _kept[key] = call[0].clone()
    return run_captured(_kept.get(key, call[0]), *call[1:], **options)


@fault(
    "graph", source="deepseek-ai/DeepGEMM/pull/451", condition="a second replay", shows=None, devices=CUDA,
    graph_capturable=True, stateful=True,
)  # fmt: skip
def replay_returns_the_one_before(*call: Tensor, **options: Any) -> Tensor:
    """The flags of the replay before look valid: each replay returns the result of the one before."""
    right = run_captured(*call, **options)
    if not _capturing():
        _kept[("before", right.shape, right.dtype)] = right.clone()
        return right
    before = _kept.setdefault(("before", right.shape, right.dtype), right.clone())
    out = before.clone()
    before.copy_(right)
    return out


@fault("graph", condition="a second replay", shows=None, devices=CUDA, graph_capturable=True, stateful=True)
def replays_accumulate(*call: Tensor, **options: Any) -> Tensor:
    """The counter that zeroes the output is captured at its first value: replays accumulate."""
    right = run_captured(*call, **options)
    if not _capturing():
        _kept[("sum", right.shape, right.dtype)] = torch.zeros_like(right)
        return right
    kept = _kept.setdefault(("sum", right.shape, right.dtype), torch.zeros_like(right))
    return kept.add_(right).clone()


@fault(
    "graph", source="microsoft/onnxruntime/pull/32121", condition="replay after a call of another shape", shows=None,
    devices=CUDA, graph_capturable=True, stateful=True,
)  # fmt: skip
def graph_reads_freed_memory(*call: Tensor, **options: Any) -> Tensor:
    """Ids are computed from a buffer that was freed after the capture and belongs to somebody else."""
    shape = call[4].shape
    if not _capturing():
        # Emulated safely: the buffer stays alive, and a call of another shape writes into it.
        for key in [key for key in _kept if key[0] == "freed" and key[1] != shape]:
            _kept[key].zero_()
        _kept.setdefault(("freed", shape, call[4].dtype), torch.ones_like(call[4]))
        return run_captured(*call, **options)
    owned = _kept.get(("freed", shape, call[4].dtype), torch.ones_like(call[4]))
    return run_captured(*call[:4], torch.where(owned == 1, call[4], 0), **options)


@fault(
    "graph", source="sgl-project/sglang/issues/16972", condition="capture", shows=None, devices=CUDA,
    graph_capturable=True,
)  # fmt: skip
def capture_takes_another_path(*call: Tensor, **options: Any) -> Tensor:
    """Under capture a simpler path is chosen, which knows SiLU only and no sentinels."""
    if not _capturing():
        return run_captured(*call, **options)
    return run_captured(*call[:4], call[4].clamp(min=0), **{**options, "activation": "silu"})


@fault("graph", condition="capture", shows=None, devices=CUDA, graph_capturable=True)
def declared_capturable_but_synchronises(*call: Tensor, **options: Any) -> Tensor:
    """It is declared capturable and synchronises with the host."""
    return run(*call, **options)


@fault(
    "streams", source="EfficientMoE/MoE-Infinity/pull/197", condition="any; timing decides how much is seen",
    shows=None, devices=CUDA,
)  # fmt: skip
def side_stream_not_ordered(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The experts run on a stream that is ordered neither after the inputs nor before the output."""
    stream = torch.cuda.Stream(hidden_states.device)
    out = unwritten_like(hidden_states)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: without the missing wait the caller is faster
        out.copy_(run_captured(hidden_states, *call, **options))
    out.record_stream(stream)
    return out


@fault("streams", condition="called on a stream other than the default one", shows=None, devices=CUDA)
def default_stream_always(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Work is enqueued on the default stream whatever the caller's stream is."""
    default = torch.cuda.default_stream(hidden_states.device)
    if torch.cuda.current_stream(hidden_states.device) == default:
        return run_captured(hidden_states, *call, **options)
    with torch.cuda.stream(default):
        torch.cuda._sleep(20_000_000)
        return run_captured(hidden_states, *call, **options)


@fault(
    "bits", source="vllm-project/vllm/pull/53440", condition="k > 2, two equal calls", shows=None, devices=CUDA,
    deterministic=True, sign="repeat",
)  # fmt: skip
def index_add_in_order_of_arrival(*call: Tensor, **options: Any) -> Tensor:
    """index_add_ with the same destination twice adds in the order of arrival."""

    def atomics(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weighted = (live(topk_weights, ids, slots.dtype)[..., None] * slots).flatten(0, 1)
        tokens = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        return torch.zeros_like(slots[:, 0]).index_add_(0, tokens, weighted)

    return run(*call, **options, combine=atomics)


@fault("offsets", source="sgl-project/sglang/pull/4727", condition="T * k * H > 2^31", shows=None, devices=CUDA)
def output_offset_in_32_bits(*call: Tensor, **options: Any) -> Tensor:
    """The output offset of a slot is computed in 32 bits and wraps: far slots are written elsewhere."""

    def wrapped(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weights = live(topk_weights, ids, slots.dtype)
        far = torch.arange(ids.numel(), device=ids.device).view_as(ids) * slots.shape[-1] >= 2**31
        # A wrapped store lands out of the slot's place, which keeps 0.
        return (weights.masked_fill(far, 0)[..., None] * slots).sum(1)

    return run(*call, **options, combine=wrapped)


@fault("offsets", source="linkedin/Liger-Kernel/issues/1296", condition="E * 2I * H > 2^31", shows=None, devices=CUDA)
def weight_offset_in_32_bits(hidden_states: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """expert * stride is computed in 32 bits: far experts read other experts' weights."""
    stride = max(gate_up.shape[1] * gate_up.shape[2], 1)

    def wrapped(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return torch.where(ids * stride >= 2**31, 0, ids)

    return run(hidden_states, gate_up, *call, **options, locate=wrapped)


@fault("contract", shows=None, devices=CUDA, sign="shape")
def returns_cpu_tensor(*call: Tensor, **options: Any) -> Tensor:
    """The result is left on the CPU."""
    return run(*call, **options).cpu()
