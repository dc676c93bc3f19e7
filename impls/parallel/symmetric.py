"""The sum over ranks through symmetric memory, with the residual and the norm behind it, in one launch.

    total = sum over ranks of part, in their order and in fp32, + residual       rounded once
    out   = weight * total / sqrt(mean(total^2) + eps)                           from the rounded total, as rms_norm

Every rank makes the same sums in the same order, so that all hold the same bits and every router after it chooses
alike.  Nothing is read back to the host and the numbers of the calls are kept on the device: a CUDA graph may hold
calls and be replayed.  All calls of a group are made on one stream.  Parts of more than LARGEST bytes are summed by the
group's own all_reduce (NCCL), which moves each of them 2 (R - 1) / R times and not R - 1 times.

No GPU has run it: `suites/performance/sum_norm.py` is what checks and times it on two.
"""

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from moe_harness.impls.dispatchers.symmetric import Workspace, placed
from moe_harness.impls.launching import Prepared

LARGEST = 1 << 20  # bytes of one rank's part
WIDEST = 16384  # columns that one program holds


class SumNorm:
    """The ranks of one group.

    Raises:
        NotImplementedError: on every rank, where the group is not on GPUs.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._require(group)
        from moe_harness.impls.parallel import _sum_norm

        self.group, self.device, self.kernels = group, device, _sum_norm
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._space: Workspace | None = None
        self._started: dict[tuple[Any, ...], Prepared] = {}

    def _require(self, group: dist.ProcessGroup) -> None:
        if dist.get_backend(group) != "nccl":
            raise NotImplementedError(f"symmetric memory joins GPUs, not ranks on {dist.get_backend(group)}")

    def fits(self, part: Tensor) -> bool:
        """Whether parts of this size go through symmetric memory; the same on every rank, as they are equally large."""
        rows, width = part.shape
        size = rows * width * part.element_size()
        return 0 < width <= WIDEST and size <= LARGEST

    def __call__(
        self, part: Tensor, weight: Tensor | None = None, *, eps: float = 0.0, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, total) of this rank's part.  A collective.

        Args:
            part: [T, H], fp32, fp16 or bf16, for which `fits` holds.
            weight: [H], the norm's; None: there is no norm, and out is total.
            residual: [T, H], the same on every rank, counted once.

        Returns:
            New tensors [T, H] in the dtype of part.

        Raises:
            ValueError: operands that do not fit together, or do not fit.
        """
        self._check(part, weight, residual)
        total = torch.empty_like(part, memory_format=torch.contiguous_format)
        out = total if weight is None else torch.empty_like(total)
        given = [placed(tensor) for tensor in (part, part if residual is None else residual)]
        scale = given[0] if weight is None else placed(weight)
        start = self._prepared(part, eps, residual is not None, weight is not None)
        start(*given, scale, out, total, len(part))
        return out, total

    def _prepared(self, part: Tensor, eps: float, add: bool, norm: bool) -> Prepared:
        """The start of the kernel for rows of this kind; the first one is a collective, which maps the memory."""
        width = part.shape[1]
        key = (part.dtype, width, eps, add, norm)
        if key not in self._started:
            space = self._workspace()
            bound = space.half // (self.ranks * width * part.element_size())
            fixed = (space.peers, space.epochs, eps, bound, width, space.first, space.half)
            block = triton.next_power_of_2(width)
            constants = {
                "ADD": add, "NORM": norm, "RANK": self.rank, "RANKS": self.ranks, "PROGRAMS": self.kernels.PROGRAMS,
                "BLOCK": block, "WIDEN": self.device.type != "cuda",
            }  # fmt: skip
            self._started[key] = Prepared(self.kernels.sum_norm, self.kernels.PROGRAMS, fixed, constants)
        return self._started[key]

    def _workspace(self) -> Workspace:
        if self._space is None:
            flags = 2 * self.kernels.PROGRAMS * self.ranks * 8
            self._space = self._mapped(flags + 2 * (self.ranks * LARGEST + 4096))
        return self._space

    def _mapped(self, size: int) -> Workspace:
        return Workspace.mapped(self.group, size, self.device, self.kernels.PROGRAMS)

    def _check(self, part: Tensor, weight: Tensor | None, residual: Tensor | None) -> None:
        shapes = [tuple(t.shape) for t in (part, weight, residual) if t is not None]
        fitting = weight is None or (tuple(weight.shape) == tuple(part.shape[1:]) and weight.dtype == part.dtype)
        if not fitting or (residual is not None and (residual.shape, residual.dtype) != (part.shape, part.dtype)):
            raise ValueError(f"shapes are {shapes}, wanted [T, H], [H] and [T, H] in one dtype")
        if not self.fits(part):
            raise ValueError(
                f"the part is {tuple(part.shape)} of {part.dtype}, wanted at most {LARGEST} bytes in rows of up to "
                f"{WIDEST} columns"
            )


def available(group: dist.ProcessGroup) -> bool:
    """Whether `SumNorm` can serve a group; the same on every rank."""
    return dist.get_backend(group) == "nccl" and importlib.util.find_spec("triton") is not None
