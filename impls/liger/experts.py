"""Liger's `LigerFusedMoEFunction`: routing metadata, gather + gate_up + SwiGLU, down projection, weighted sum.

Read in liger-kernel 0.8.5: Triton kernels with fp32 accumulators.  The activation and each expert's output are stored
in the dtype of hidden_states, the weighted sum over slots is made in fp32.  Products of fp32 operands go through tf32,
cut off rather than rounded, so fp32 is refused.  Ids are indices into the weights and nothing else: there is no
masked slot.

Its first call at each (H, I) times 32 tiles of two kernels, a minute of compiling, which `moe-harness check` takes for
a hang: judge it with LIGER_FUSED_MOE_AUTOTUNE=0, which takes one tile, and time it without.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["experts"]


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts`: hidden_states [T, H], gate_up_proj [E, 2I, H], down_proj [E, H, I] -> [T, H].

    Raises:
        NotImplementedError: liger-kernel is not installed, the tensors are not on a CUDA device, fp32, an activation
            other than silu, a masked slot, no token.
    """
    if hidden_states.device.type != "cuda":
        raise NotImplementedError(f"liger runs on CUDA devices only, and hidden_states are on {hidden_states.device}")
    if hidden_states.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"liger multiplies in tf32 or less: fp16 and bf16 only, not {hidden_states.dtype}")
    if activation != "silu":
        raise NotImplementedError(f"liger's fused MoE has silu only, not {activation!r}")
    function = _fused_moe()
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    # Nothing can be asked of a stream that is being captured; whoever captures has called it before.
    if not torch.cuda.is_current_stream_capturing() and (ids < 0).any():
        raise NotImplementedError("liger's fused MoE counts every id as an expert: it takes no masked slot")
    if ids.numel() == 0:
        raise NotImplementedError("liger's fused MoE launches empty grids for no token")
    with torch.no_grad():
        return function(hidden_states, gate_up_proj, down_proj, ids.int(), topk_weights)


experts.devices = ("cuda",)
experts.dtypes = ("fp16", "bf16")
experts.rounds = ("activation", "expert_output")


def _fused_moe() -> Callable[..., Tensor]:
    try:
        from liger_kernel.ops import LigerFusedMoEFunction
    except ImportError as error:
        raise NotImplementedError(
            f"liger needs the package liger-kernel with LigerFusedMoEFunction: pip install 'moe-harness[gpu]' ({error})"
        ) from error
    return LigerFusedMoEFunction.apply
