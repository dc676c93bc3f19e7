"""Liger's RMSNorm, alone and behind the addition of a residual.  Untried, read in liger-kernel 0.8.5.

Cast as Llama does: the root mean square in fp32, the normalised value rounded before the weight.
"""

from torch import Tensor

from moe_harness.impls.foreign import needed, refuse

__all__ = ["rms_norm"]

INSTALL = "pip install 'moe-harness[gpu]'"


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The stage `rms_norm`: x and residual [..., H], weight [H] -> out [..., H], or (out, x + residual).

    Raises:
        NotImplementedError: liger-kernel is not installed, no row.
    """
    refuse("liger's RMSNorm", empty_tensor=x.numel() == 0)
    if residual is None:
        alone = needed("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", INSTALL)
        return alone.apply(x, weight, eps, 0.0, "llama", False)
    added = needed("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", INSTALL)
    out, total = added.apply(x, residual, weight, eps, 0.0, "llama", False)
    return out, total


rms_norm.devices = ("cuda",)
rms_norm.rounds = ("sum", "normalized")
