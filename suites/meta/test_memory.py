"""What a call finds in fresh memory, and that whatever it writes where it should not is told with its place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core import memory
from moe_harness.harness.core.emulation import read_past, read_strided
from moe_harness.harness.core.memory import GUARD, INT_POISON, Arena, allocations_of_zeros, poisoned_allocations

FRESH = {
    "empty": lambda dtype: torch.empty(3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(3, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3,), (2,), dtype=dtype),
    "new_empty": lambda dtype: torch.ones(2).new_empty(3, dtype=dtype),
    "new_empty_strided": lambda dtype: torch.ones(2).new_empty_strided((3,), (2,), dtype=dtype),
}


@pytest.mark.parametrize("make", FRESH)
def test_fresh_memory_holds_what_is_no_result(make: str) -> None:
    """Else a kernel that leaves part of its result unwritten passes wherever the memory was zero."""
    before = getattr(torch if hasattr(torch, make) else Tensor, make)
    with poisoned_allocations("cpu"):
        assert all(FRESH[make](dtype).isnan().all() for dtype in (torch.float32, torch.bfloat16, torch.float64))
        assert all(FRESH[make](dtype).eq(INT_POISON).all() for dtype in (torch.int32, torch.int64))
        assert FRESH[make](torch.bool).dtype == torch.bool
    with allocations_of_zeros():
        assert FRESH[make](torch.float32).eq(0).all()
    assert getattr(torch if hasattr(torch, make) else Tensor, make) is before


def test_what_has_no_memory_is_not_filled() -> None:
    with poisoned_allocations("cpu"):
        assert torch.empty(0).shape == (0,) and torch.empty(3, device="meta").is_meta


def test_what_is_taken_for_unwritten_is_what_an_allocation_holds() -> None:
    """Faults that leave memory unwritten do the same in every process."""
    assert memory.unwritten_value(torch.float32) == memory.unwritten_value(torch.int64) == 0
    with poisoned_allocations("cpu"):
        assert memory.unwritten_value(torch.int32) == INT_POISON
        assert memory.unwritten_value(torch.bfloat16) != memory.unwritten_value(torch.bfloat16)  # NaN


@pytest.mark.parametrize(
    ("kind", "shape", "is_so"),
    [
        ("contiguous", (2, 3, 4), lambda outer, middle, inner: (outer, middle, inner) == (12, 4, 1)),
        ("padded", (2, 3, 4), lambda outer, middle, inner: outer == 3 * middle > 12 and inner == 1),
        ("outer_padded", (2, 3, 4), lambda outer, middle, inner: outer > 12 and (middle, inner) == (4, 1)),
        ("strided", (2, 3, 4), lambda outer, middle, inner: (outer, middle, inner) == (24, 8, 2)),
        ("transposed", (2, 3, 4), lambda outer, middle, inner: (outer, middle, inner) == (12, 1, 3)),
        ("permuted", (2, 3, 4), lambda outer, middle, inner: (outer, middle, inner) == (4, 8, 1)),
        ("expanded", (2, 3, 4), lambda outer, middle, inner: (outer, middle, inner) == (0, 4, 1)),
        ("unit", (2, 1, 4), lambda outer, middle, inner: outer == inner * 4 == 4 != middle),
        ("padded", (4,), lambda inner: inner == 1),
    ],
)
def test_each_layout_has_the_strides_of_its_name(kind: str, shape: tuple[int, ...], is_so: Callable[..., bool]) -> None:
    assert is_so(*memory.strides_of(shape, kind))


def test_only_the_offset_layout_begins_where_no_vector_may() -> None:
    begun = {kind: placed(kind)[1].storage_offset() % 4 for kind in memory.LAYOUTS}
    assert [kind for kind, past in begun.items() if past] == ["offset"]


def placed(kind: str = "padded", dtype: torch.dtype = torch.float32) -> tuple[Arena, Tensor]:
    arena = Arena()
    return arena, arena.place("x", torch.arange(12).reshape(3, 4).to(dtype), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("kind", memory.LAYOUTS)
def test_an_operand_is_its_values_and_nothing_has_happened_to_it(kind: str, dtype: torch.dtype) -> None:
    arena, x = placed(kind, dtype)
    wanted = torch.arange(12).reshape(3, 4).to(dtype)
    assert torch.equal(x, wanted[:1].expand(3, 4) if kind == "expanded" else wanted)
    assert arena.violations() == [] and arena.aliased_by(x[1]) == "x" and arena.aliased_by(wanted) is None


def test_what_is_written_into_an_operand_is_counted() -> None:
    arena, x = placed()
    x[1, :2] = -1.0
    assert arena.violations() == [("x", "was modified in 2 of 12 elements")]
    arena.refresh()
    assert arena.violations() == []


@pytest.mark.parametrize("offset", [-GUARD, -1, 4, 8, GUARD + 21])
def test_what_is_written_around_an_operand_is_told_with_its_place(offset: int) -> None:
    """Before it, behind its rows and behind its end, whether or not it may be written itself."""
    arena, x = placed()
    x.as_strided((1,), (1,), x.storage_offset() + offset).fill_(0.0)
    told = [("x", f"had 1 elements written outside of it, the first at element offset {offset}")]
    assert arena.violations() == told
    arena, x = placed()
    x[0, 0] = 7.0
    assert arena.violations(written=("x",)) == []
    x.as_strided((1,), (1,), x.storage_offset() + offset).fill_(0.0)
    assert arena.violations(written=("x",)) == told


def test_of_several_elements_the_first_is_told() -> None:
    arena, x = placed()
    x.as_strided((2,), (1,), x.storage_offset() - 3).fill_(0.0)
    assert arena.violations() == [("x", "had 2 elements written outside of it, the first at element offset -3")]


def test_a_large_operand_is_compared_by_a_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SNAPSHOT_LIMIT", 8)
    arena, x = placed()
    assert arena.violations() == []
    x[2, 3] = 0.5
    assert arena.violations() == [("x", "was modified")]
    assert arena.violations(written=("x",)) == []


def test_what_is_read_by_other_strides_stays_inside_the_storage() -> None:
    """As a fault reads it: right where the strides are right, and never beyond the last element."""
    whole = torch.arange(24.0)
    x = whole.reshape(4, 6)[1:, :4]
    assert torch.equal(read_strided(x, (3, 4), (6, 1)), x)
    assert torch.equal(read_strided(x, (3, 4), (4, 1)), whole[6:18].reshape(3, 4))
    assert torch.equal(read_past(x, 6), whole[6:].reshape(3, 6))
    assert read_strided(x, (3, 4), (8, 1))[2].tolist() == [22.0, 23.0, 23.0, 23.0]
    assert read_strided(torch.empty(0), (2, 3), (3, 1)).eq(0).all()
