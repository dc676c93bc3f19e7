"""The sum over ranks through symmetric memory, with the residual and the norm behind it, in one launch.

    total = sum over ranks of part, in their order and in fp32, + residual       rounded once
    out   = weight * total / sqrt(mean(total^2) + eps)                           from the rounded total, as rms_norm

Every rank makes the same sums in the same order, so that all hold the same bits and every router after it chooses
alike.  Nothing is read back to the host and the numbers of the calls are kept on the device: a CUDA graph may hold
calls and be replayed.  All calls of a group are made on one stream.  Parts of more than LARGEST bytes are summed by the
group's own all_reduce (NCCL), which moves each of them 2 (R - 1) / R times and not R - 1 times.

A rank's part may be left half done by the kernel before: `of_slots` sums what its experts yield, `of_pieces` a product
in parts over its depth.  `suites/performance/sum_norm.py` checks and times it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from moe_harness.impls.dispatchers.symmetric import Workspace, placed
from moe_harness.impls.launching import Prepared
from moe_harness.impls.triton._common import early_start

LARGEST = 1 << 20  # bytes of one rank's part
IN_WORDS = 1 << 16  # bytes of one rank's part up to which it is put in words: docs/benches.md has the times
WIDEST = 16384  # columns that one program holds


class Slots(NamedTuple):
    """Whose a rank's rows of experts are: weights and ids [T, k], and which of the ids it has."""

    weights: Tensor
    ids: Tensor
    num_experts: int
    local: Tensor | None


class Own(NamedTuple):
    """This rank's part: `like` [T, H] itself, or the sum of `pieces`, of experts' rows by `slots`."""

    like: Tensor
    slots: Slots | None = None
    pieces: Tensor | None = None

    @property
    def terms(self) -> int:
        return 1 if self.pieces is None or self.slots is not None else len(self.pieces)


class SumNorm:
    """The ranks of one group.

    Args:
        largest: bytes of one rank's part, multiples of 128 as `in_words`.
        in_words: those up to which it is put in words.

    Raises:
        NotImplementedError: on every rank, where the group is not on GPUs.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, largest: int = LARGEST, in_words: int = IN_WORDS
    ):  # fmt: skip
        self._require(group)
        from moe_harness.impls.parallel import _sum_norm

        self.group, self.device, self.kernels = group, device, _sum_norm
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._space: Workspace | None = None
        self.largest, self.in_words = largest, in_words
        self._started: dict[tuple[Any, ...], Prepared] = {}

    def _require(self, group: dist.ProcessGroup) -> None:
        if dist.get_backend(group) != "nccl":
            raise NotImplementedError(f"symmetric memory joins GPUs, not ranks on {dist.get_backend(group)}")

    def fits(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether parts of this size go through symmetric memory; the same on every rank, as they are equally large."""
        rows, width = shape
        return 0 < width <= WIDEST and rows * width * dtype.itemsize <= self.largest and dtype.itemsize <= 4

    def __call__(
        self, part: Tensor, weight: Tensor | None = None, *, eps: float = 0.0, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, total) of this rank's part.  A collective.

        Args:
            part: [T, H], fp32, fp16 or bf16, for which `fits` holds.
            weight: [H], the norm's, in the dtype of part or fp32; None: there is no norm, and out is total.
            residual: [T, H], the same on every rank, counted once.

        Returns:
            New tensors [T, H] in the dtype of part.

        Raises:
            ValueError: operands that do not fit together, or do not fit.
        """
        return self._summed(Own(part), part.dtype, weight, eps, residual)

    def of_pieces(self, pieces: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, where this rank's part is the sum of fp32 pieces [n, T, H], rounded to the dtype of `residual`."""
        if pieces.dtype != torch.float32:
            raise ValueError(f"pieces are {pieces.dtype}, wanted fp32")
        return self._summed(Own(pieces[0], pieces=pieces), residual.dtype, weight, eps, residual)

    def of_slots(
        self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight: Tensor, *, eps: float, residual: Tensor,
        num_experts: int, local: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As a call, where this rank's part is the experts' weighted sum, rounded to the dtype of `residual`.

        Args:
            rows: [T * k, H], what each slot's expert yields; undefined where the slot is another rank's.
            topk_weights, topk_ids: [T, k].
            num_experts: those of this rank, ids of which are below it; `local` [E] makes such ids of what is given.
        """
        slots = Slots(topk_weights.contiguous(), topk_ids.contiguous(), num_experts, local)
        if len(rows) != topk_ids.numel():
            raise ValueError(f"rows are {tuple(rows.shape)}, wanted {topk_ids.numel()} of them")
        return self._summed(Own(rows[: len(topk_ids)], slots=slots, pieces=rows), residual.dtype, weight, eps, residual)

    def _summed(
        self, own: "Own", dtype: torch.dtype, weight: Tensor | None, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, width = own.like.shape
        self._check(own.like, dtype, weight, residual)
        total = torch.empty((rows, width), dtype=dtype, device=own.like.device)
        out = total if weight is None else torch.empty_like(total)
        part = placed(own.like if own.pieces is None else own.pieces)
        choice = (part, part, part)  # of slots, where there are any
        if own.slots is not None:
            weights, ids, _, local = own.slots
            choice = (placed(weights), placed(ids), placed(ids if local is None else local))
        added, scale = (part if tensor is None else placed(tensor) for tensor in (residual, weight))
        start = self._prepared(own, dtype, eps, residual is not None, None if weight is None else weight.dtype)
        start(part, *choice, added, scale, out, total, rows)
        return out, total

    def _prepared(
        self, own: "Own", dtype: torch.dtype, eps: float, add: bool, norm: torch.dtype | None
    ) -> Prepared:  # fmt: skip
        """The start of the kernel for rows of this kind; the first one is a collective, which maps the memory."""
        (rows, width), slots = own.like.shape, own.slots
        words = rows * 8 * words_of(width, dtype) <= 2 * self.in_words
        kind = None if slots is None else (slots.weights.dtype, slots.ids.dtype, slots.ids.shape[1], slots.num_experts)
        known = 0 if slots is None or slots.local is None else len(slots.local)
        key = (own.like.dtype, dtype, width, eps, add, norm, own.terms, kind, known, words)
        if key not in self._started:
            early, block = early_start(self.device), max(16, triton.next_power_of_2(width))
            constants = {
                "ADD": add, "NORM": norm is not None, "RANK": self.rank, "RANKS": self.ranks,
                "PROGRAMS": self.kernels.PROGRAMS, "BLOCK": block, "PIECES": own.terms,
                "SLOTS": 0 if slots is None else slots.ids.shape[1],
                "HAS_MAP": known > 0, "WIDEN": self.device.type != "cuda", "PDL": early, "launch_pdl": early,
                "num_warps": max(1, min(16, block // 256)),
            }  # fmt: skip
            experts = 0 if slots is None else slots.num_experts
            fixed = (*self._place(width, dtype, words, eps), experts, known)
            kernel = self.kernels.sum_norm
            if words:
                kernel, constants["BITS"] = self.kernels.sum_norm_in_words, 8 * dtype.itemsize
                fixed = (*fixed, words_of(width, dtype))
            self._started[key] = Prepared(kernel, self.kernels.PROGRAMS, fixed, constants)
        return self._started[key]

    def _place(self, width: int, dtype: torch.dtype, words: bool, eps: float) -> tuple[Any, ...]:
        """The kernels' arguments from peers to half_size: rows lie in front in each half, words behind them."""
        space, behind = self._workspace(), self.ranks * self.largest
        bound = self.largest // (width * dtype.itemsize)
        if words:
            bound = 2 * self.in_words // (8 * words_of(width, dtype))
        return space.peers, space.epochs, eps, bound, width, space.first + (behind if words else 0), space.half

    def _workspace(self) -> Workspace:
        if self._space is None:
            flags = 2 * self.kernels.PROGRAMS * self.ranks * 8
            self._space = self._mapped(flags + 2 * self.ranks * (self.largest + 2 * self.in_words) + 4096)
        return self._space

    def _mapped(self, size: int) -> Workspace:
        return Workspace.mapped(self.group, size, self.device, self.kernels.PROGRAMS)

    def _check(self, part: Tensor, dtype: torch.dtype, weight: Tensor | None, residual: Tensor | None) -> None:
        shape, width = part.shape, part.shape[1:]
        fitting = weight is None or (weight.shape == width and weight.dtype in (dtype, torch.float32))
        if not fitting or (residual is not None and (residual.shape != shape or residual.dtype != dtype)):
            shapes = [tuple(tensor.shape) for tensor in (part, weight, residual) if tensor is not None]
            raise ValueError(f"shapes are {shapes}, wanted [T, H], [H] and [T, H] in one dtype, or [H] in fp32")
        if not self.fits(shape, dtype):
            raise ValueError(
                f"the part is {tuple(shape)} of {dtype}, wanted at most {self.largest} bytes in rows of up to {WIDEST} "
                f"columns"
            )


def words_of(width: int, dtype: torch.dtype) -> int:
    """Words of a row, an even number: rows begin at multiples of 16 bytes."""
    return -(-width * dtype.itemsize // 8) * 2


def available(group: dist.ProcessGroup) -> bool:
    """Whether `SumNorm` can serve a group; the same on every rank."""
    return dist.get_backend(group) == "nccl" and importlib.util.find_spec("triton") is not None
