"""transformers' experts, `Qwen3MoeExperts`, through each of its three paths: eager, batched_mm, grouped_mm.

All families of transformers share this code.  What is translated at the boundary is how its own callers call it:

- ids are int64;
- with expert parallelism its router gives a slot that lives elsewhere the index num_experts and the weight 0, so that
  is what an id of -1 becomes here, directly or through expert_map.

eager rejects that index inside its own one_hot, so it is refused there.  batched_mm runs such a slot on the last expert
and multiplies by 0, which is not 0 when that expert holds an infinity or a NaN: refused in that case.
"""

import torch
from torch import Tensor, nn

__all__ = ["eager", "batched_mm", "grouped_mm"]

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
GATHER_LIMIT = 2**31  # bytes of gathered weights that batched_mm may take on a CPU


def eager(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts` through the forward of the class itself: expert by expert, summed in the model's dtype.

    Raises:
        NotImplementedError: a masked slot.
    """
    ids, masked = _local_ids(topk_ids, expert_map, gate_up_proj.shape[0])
    if masked.any():
        raise NotImplementedError(
            "transformers' eager experts take no masked slot: one_hot rejects -1 and the expert-parallel index alike"
        )
    return _run("eager", hidden_states, gate_up_proj, down_proj, topk_weights, ids, activation)


eager.rounds = ("gate_up", "activation", "expert_output", "weighted", "partial_sum")


def batched_mm(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts` through batched_mm: weights gathered for every slot, then one bmm per projection.

    Raises:
        NotImplementedError: a masked slot while the last expert's weights are not finite; on a CPU, more than
            GATHER_LIMIT bytes of gathered weights.
    """
    ids, masked = _local_ids(topk_ids, expert_map, gate_up_proj.shape[0])
    _check_gather(gate_up_proj, ids.numel())
    # Nothing can be asked of a stream that is being captured; whoever captures has called it before.
    finite = _capturing() or not masked.any() or (gate_up_proj[-1].isfinite().all() and down_proj[-1].isfinite().all())
    if not finite:
        raise NotImplementedError(
            "transformers' batched_mm runs masked slots on the last expert, whose weights are not finite here"
        )
    weights = topk_weights.masked_fill(masked, 0.0)
    return _run("batched_mm", hidden_states, gate_up_proj, down_proj, weights, ids, activation)


batched_mm.rounds = ("gate_up", "activation", "expert_output", "weighted")
batched_mm.deterministic = True


def grouped_mm(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts` through grouped_mm, transformers' default: slots sorted by expert, two grouped GEMMs.

    Raises:
        NotImplementedError: an operand whose strides or alignment torch's grouped_mm rejects.
    """
    ids, masked = _local_ids(topk_ids, expert_map, gate_up_proj.shape[0])
    weights = topk_weights.masked_fill(masked, 0.0)
    _check_alignment(hidden_states, gate_up_proj, down_proj)
    try:
        return _run("grouped_mm", hidden_states, gate_up_proj, down_proj, weights, ids, activation)
    except RuntimeError as error:
        if "strides" in str(error) or "aligned" in str(error):
            raise NotImplementedError(f"transformers' grouped_mm hands its operands on as they are: {error}") from error
        raise


grouped_mm.rounds = ("gate_up", "activation", "expert_output", "weighted")
grouped_mm.deterministic = True


def _capturing() -> bool:
    """Whether this call is being recorded into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _local_ids(topk_ids: Tensor, expert_map: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """int64 ids with num_experts in masked slots, and where those are, both [T, k]."""
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    masked = ids < 0
    return ids.masked_fill(masked, num_experts), masked


def _check_alignment(*operands: Tensor) -> None:
    """torch's CUDA kernel checks rows but not experts or the start of an operand, and then faults on the device."""
    for operand in operands:
        strides = [s for s, size in zip(operand.stride(), operand.shape, strict=True) if size > 1 and s != 1]
        starts = [operand.data_ptr(), *(s * operand.element_size() for s in strides)]
        if operand.is_cuda and any(start % 16 for start in starts):
            raise NotImplementedError("transformers' grouped_mm hands its operands on as they are: not on 16 bytes")


def _check_gather(gate_up_proj: Tensor, slots: int) -> None:
    needed = slots * gate_up_proj[:1].numel() * gate_up_proj.element_size()
    if gate_up_proj.device.type == "cpu" and needed > GATHER_LIMIT:
        raise NotImplementedError(
            f"transformers' batched_mm copies the weights of each of the {slots} slots: {needed / 2**30:.1f} GiB"
        )


def _run(path: str, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
    with torch.no_grad():
        return _module(path, gate_up, down, activation)(x, ids, weights)


def _module(path: str, gate_up: Tensor, down: Tensor, activation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, but should be one of {', '.join(ACTIVATIONS)}")
    config = Qwen3MoeConfig(
        num_experts=gate_up.shape[0],
        hidden_size=gate_up.shape[2],
        moe_intermediate_size=gate_up.shape[1] // 2,
        hidden_act=ACTIVATIONS[activation],
        experts_implementation=path,  # type: ignore[call-arg]  # a keyword of the parent
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    return module.eval()
