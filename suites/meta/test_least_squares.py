"""Least squares beside columns that say nothing: the same answer whatever lies in memory."""

import torch

from moe_harness.harness.core.least_squares import least_squares


def test_a_column_of_zeros_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        kept = [torch.full((count,), 7, dtype=torch.int32) for count in (1, 2, 2, 3, 4, 8, 16)]
        del kept  # small numbers are what memory holds, as it does in a process that works with ids
        column = torch.randint(-99999, 99999, (24,), generator=generator).double()
        matrix = torch.stack([column, torch.zeros_like(column)], 1)
        assert torch.allclose(least_squares(matrix, column / 2), torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_columns_that_depend_on_each_other_share() -> None:
    column = torch.arange(1.0, 9.0)
    found = least_squares(torch.stack([column, 2 * column], 1), 5 * column)
    assert torch.allclose(found, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_no_columns_give_nothing() -> None:
    assert least_squares(torch.zeros(4, 0), torch.ones(4)).shape == (0,)
