"""What several stages' faults are built from: reads past the end of a row, tiles, reduced precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.memory import unwritten_value

BLOCK = 16  # side of the emulated tiles: small, so that small cases have tails


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def round_up(size: int, block: int = BLOCK) -> int:
    """The next multiple of `block`."""
    return -(-size // block) * block


def round_down(size: int, block: int = BLOCK) -> int:
    """The last multiple of `block` that is not larger."""
    return size // block * block


def flat_storage(tensor: Tensor) -> Tensor:
    """All elements of the storage under `tensor`, also those that belong to no index of it."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (size,), (1,), 0)


def unwritten(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a fault forgets to write.  `torch.empty` would make what the fault does hang on the allocator."""
    return torch.full(shape, unwritten_value(dtype), dtype=dtype, device=device)


def unwritten_like(tensor: Tensor) -> Tensor:
    """As `unwritten`, with the shape, dtype, device and, where it is dense, the strides of `tensor`."""
    return torch.full_like(tensor, unwritten_value(tensor.dtype))


def read_strided(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """What a kernel loads with its own idea of shape and strides, kept inside the storage by clamping."""
    offsets = torch.full((), int(tensor.storage_offset()), dtype=torch.int64, device=tensor.device)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = torch.arange(size, device=tensor.device) * stride
        offsets = offsets + steps.view(-1, *[1] * (len(shape) - dim - 1))
    storage = flat_storage(tensor)
    if not storage.numel():
        return tensor.new_zeros(shape)
    return storage[offsets.clamp(max=storage.numel() - 1)]


def read_past(tensor: Tensor, width: int) -> Tensor:
    """The last dimension widened to `width` without a mask: whatever lies behind each row comes along."""
    return read_strided(tensor, (*tensor.shape[:-1], width), tensor.stride())


def read_as_contiguous(tensor: Tensor) -> Tensor:
    """The tensor as a kernel sees it that computes offsets from the shape alone."""
    strides = torch.empty(tensor.shape, device="meta").stride()
    return read_strided(tensor, tuple(tensor.shape), strides)


def pad_last(tensor: Tensor, width: int) -> Tensor:
    """The last dimension widened to `width` with zeros, as a masked load does."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


def to_tf32(tensor: Tensor) -> Tensor:
    """Keep 10 bits of the significand, as tensor cores do with fp32 operands."""
    kept = tensor.float().view(torch.int32)
    return ((kept + 0x1000) & ~0x1FFF).view(torch.float32)


def matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T with the sums in fp32 or wider."""
    kind = wide(rows)
    return rows.to(kind) @ weight.to(kind).T


def matmul_rounding_sums(rows: Tensor, weight: Tensor, dtype: torch.dtype, block: int = BLOCK) -> Tensor:
    """rows @ weight.T in K blocks, the running sum stored in `dtype` after each."""
    total = torch.zeros(rows.shape[0], weight.shape[0], dtype=dtype, device=rows.device)
    for start in range(0, rows.shape[1], block):
        part = matmul(rows[:, start : start + block], weight[:, start : start + block])
        total = (total.to(part.dtype) + part).to(dtype)
    return total.to(wide(rows))


def halves_added_in(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`product` of rows and weight over either half of their depth, the two stored in `dtype` and added there."""

    def in_halves(rows: Tensor, weight: Tensor) -> Tensor:
        shares = zip(rows.tensor_split(2, -1), weight.tensor_split(2, -1), strict=True)
        first, second = (product(*share).to(dtype) for share in shares)
        return (first + second).to(wide(rows))

    return in_halves


def product_in(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A product in fp64 whose sums are rounded to `dtype`."""

    def matmul(rows: Tensor, weight: Tensor) -> Tensor:
        total = rows.double() @ weight.double().T
        return total.to(dtype).to(wide(rows))

    return matmul
