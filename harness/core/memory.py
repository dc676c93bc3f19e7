"""Operands laid out and fenced in: guard words around every operand, NaN behind every row, poison in fresh memory.

Every operand is a view into a buffer of its own that holds poison everywhere else: NaN for floating point, 2^30 for
integers.  A kernel that reads past a row or an operand computes with poison; one that writes there, or into an input,
is seen by comparing the buffers' bits with a snapshot.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements on each side; 64 fp32 are 256 bytes, more than any vector access reaches
INT_POISON = 1 << 30
FINITE_POISON = 2.0**13
SNAPSHOT_LIMIT = 1 << 28  # bytes; larger buffers are compared by a checksum
LAYOUTS = ("contiguous", "padded", "offset", "strided", "transposed", "outer_padded", "expanded", "unit", "permuted")


def poison_value(dtype: torch.dtype) -> float | int:
    """What unowned memory holds: NaN, or an index no tensor has."""
    if dtype.is_floating_point:
        return float("nan")
    return INT_POISON if dtype.itemsize >= 4 else torch.iinfo(dtype).max  # 255: also the e8m0 that is no number


def _poison_behind(values: Tensor) -> float | int:
    """As `poison_value`, but finite where the matrix product of some CPUs multiplies what lies there by 0, giving NaN.

    A bf16 product on CPUs with AMX reads past the rows of its left operand, from 17 rows on: where the row length is
    odd with torch 2.13, where it is no multiple of 32 with torch 2.11.  An implementation in plain torch is not to
    blame for that.  It holds on every CPU, so that a case gives one verdict wherever it is replayed.  A kernel that
    takes part in the product with what lies there is still seen, since nothing near 2^13 is in the data, and one that
    multiplies it by 0 is seen in fp32 and fp16.
    """
    odd = values.dim() > 0 and values.shape[-1] % 32 != 0
    if odd and values.dtype == torch.bfloat16 and values.device.type == "cpu":
        return FINITE_POISON
    return poison_value(values.dtype)


def strides_of(shape: tuple[int, ...], kind: str) -> list[int]:
    """Strides, in elements, of `shape` laid out as `kind`."""
    inner = {"strided": 2}.get(kind, 1)
    order = list(range(len(shape)))
    if kind == "transposed" and len(shape) >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    if kind == "permuted":  # whole rows, as in tokens by heads seen in a tensor of heads by tokens
        order[:-1] = order[-2::-1]
    strides = [0] * len(shape)
    step = inner
    for place, dim in enumerate(reversed(order)):
        strides[dim] = step
        step *= max(1, shape[dim])
        if (kind == "padded" and place == 0) or (kind == "outer_padded" and place == len(shape) - 2):
            step += 5 if place == 0 else 3 * shape[-1] + 2
    if kind == "expanded" and shape:
        strides[0] = 0
    if kind == "unit":  # the stride of a dimension of size 1 says nothing, and may be anything
        strides = [977 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    return strides


@dataclass
class _Operand:
    name: str
    buffer: Tensor
    view: Tensor
    snapshot: Tensor

    def owned(self) -> Tensor:
        """Bool, which elements of the buffer belong to the operand."""
        owned = torch.zeros_like(self.buffer, dtype=torch.bool)
        owned.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        return owned

    def accept_written(self) -> None:
        """Compare with the present elements from now on; what lies around them is still compared with what it was."""
        if self.snapshot.numel() != self.buffer.numel():  # a checksum: it cannot tell one from the other
            self.snapshot = _snapshot(self.buffer)
        else:
            self.snapshot = torch.where(self.owned(), _bits(self.buffer), self.snapshot)


class Arena:
    """Holds the buffers of one call's operands and tells what happened to them."""

    def __init__(self) -> None:
        self._operands: list[_Operand] = []

    def place(self, name: str, values: Tensor, kind: str = "contiguous") -> Tensor:
        """A view equal to `values` (except "expanded", which repeats the first row) inside a fenced buffer."""
        strides = strides_of(tuple(values.shape), kind)
        reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
        start = GUARD + (1 if kind == "offset" else 0)
        poison = _poison_behind(values)
        buffer = torch.full((start + max(reach, 1) + GUARD,), poison, dtype=values.dtype, device=values.device)
        view = buffer.as_strided(values.shape, strides, start)
        if values.numel():
            (view[:1] if kind == "expanded" else view).copy_(values[:1] if kind == "expanded" else values)
        self._operands.append(_Operand(name, buffer, view, _snapshot(buffer)))
        return view

    def refresh(self) -> None:
        """Take the present contents as the ones to compare with (after the harness itself has changed an operand)."""
        for operand in self._operands:
            operand.snapshot = _snapshot(operand.buffer)

    def violations(self, written: Collection[str] = ()) -> list[tuple[str, str]]:
        """(operand, what happened) for each operand whose buffer is no longer bit for bit as it was.

        The elements of operands in `written` may change, nothing around them may.
        """
        for operand in self._operands:
            if operand.name in written:
                operand.accept_written()
        return [(o.name, _describe(o)) for o in self._operands if not torch.equal(_snapshot(o.buffer), o.snapshot)]

    def aliased_by(self, output: Tensor) -> str | None:
        """The operand whose memory `output` shares, if any."""
        address = output.untyped_storage().data_ptr()
        for operand in self._operands:
            if output.numel() and operand.buffer.untyped_storage().data_ptr() == address:
                return operand.name
        return None


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.element_size()])


def _snapshot(buffer: Tensor) -> Tensor:
    bits = _bits(buffer)
    if buffer.numel() * buffer.element_size() <= SNAPSHOT_LIMIT:
        return bits.clone()
    return torch.stack([bits.sum(dtype=torch.int64), bits[::3].sum(dtype=torch.int64)])


def _describe(operand: _Operand) -> str:
    if operand.snapshot.numel() != operand.buffer.numel():
        return "was modified"
    changed = _bits(operand.buffer) != operand.snapshot
    owned = operand.owned()
    inside = int((changed & owned).sum())
    if inside:
        return f"was modified in {inside} of {operand.view.numel()} elements"
    first = int(changed.nonzero()[0]) - operand.view.storage_offset()
    return f"had {int(changed.sum())} elements written outside of it, the first at element offset {first}"


@contextlib.contextmanager
def poisoned_allocations(device: str) -> Iterator[None]:
    """Fresh memory holds NaN: `torch.empty` and its kin, the caching allocator's blocks, and malloc's."""
    with _poisoned_empty(), _poisoned_malloc():
        if device == "cuda":
            _dirty_cuda_cache()
        yield


def allocations_of_zeros() -> contextlib.AbstractContextManager[None]:
    """`torch.empty` and its kin give zeros: a NaN of a result is then no memory that was left unwritten."""
    return _poisoned_empty(0)


def unwritten_value(dtype: torch.dtype) -> float | int:
    """What fresh memory is taken to hold: 0, as new pages do; poison inside of `poisoned_allocations`."""
    poisoned = hasattr(torch.empty, "__wrapped__")
    return poison_value(dtype) if poisoned else 0


@contextlib.contextmanager
def _poisoned_empty(held: float | None = None) -> Iterator[None]:
    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(poison_value(out.dtype) if held is None else held) if _poisonable(out) else out

        return call

    owners: list[tuple[Any, str]] = [(torch, n) for n in ("empty", "empty_like", "empty_strided")]
    owners += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in owners]
    try:
        for owner, name, original in originals:
            setattr(owner, name, poisoning(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _poisonable(out: object) -> bool:
    if not isinstance(out, Tensor) or out.device.type == "meta" or out.numel() == 0:
        return False
    return out.dtype.is_floating_point or out.dtype in (torch.int32, torch.int64)


@contextlib.contextmanager
def _poisoned_malloc() -> Iterator[None]:
    """glibc fills what malloc hands out with 0x7f: 3e38 in fp32 and bf16, NaN in fp16; nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    perturb = -6  # M_PERTURB; allocated bytes get the complement of its value
    if mallopt is not None:
        mallopt(perturb, 0x80)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(perturb, 0)


def _dirty_cuda_cache() -> None:
    """Leave freed blocks full of NaN in the caching allocator, small and large, for the next allocations to get."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (128, 4096, 1 << 16, 1 << 19, 1 << 22) * 4]
    del blocks
