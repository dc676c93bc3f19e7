"""What the module of vLLM's Marlin kernels keeps of weights that it has put into their order, without vLLM."""

import pytest
import torch
from torch import Tensor

from moe_harness.suites.performance import marlin


def test_weights_are_prepared_once_for_as_long_as_they_live() -> None:
    """Biases of another batch are other weights: kept by the codes alone, the first ones were added to every batch."""
    made: list[tuple[Tensor, ...]] = []

    def make(*given: Tensor) -> tuple[Tensor, ...]:
        made.append(tuple(t.clone() for t in given))
        return made[-1]

    codes, first, second = torch.zeros(4), torch.ones(2), torch.full((2,), 2.0)
    assert marlin._prepared((codes, first), make) is marlin._prepared((codes, first), make)
    assert marlin._prepared((codes, second), make)[1][0] == 2.0 and len(made) == 2
    place = first.data_ptr()
    del first
    again = torch.full((2,), 3.0)  # often where the first ones lay
    assert marlin._prepared((codes, again), make)[1][0] == 3.0, again.data_ptr() == place


def test_rows_of_gate_and_up_come_in_turn_and_sizes_are_filled_up() -> None:
    rows = torch.tensor([[10, 11, 20, 21]])  # gate 10, 11 and up 20, 21 of one expert
    assert marlin._in_turn(rows).tolist() == [[10, 20, 11, 21]]
    assert marlin._filled(torch.ones(1, 2), 2, 3).tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert [marlin._up(size, 256) for size in (2880, 256, 1)] == [3072, 256, 256]


@pytest.mark.parametrize("kernel", [marlin.int4, marlin.mxfp4])
def test_experts_of_one_rank_are_refused(kernel) -> None:
    with pytest.raises(NotImplementedError, match="expert map"):
        kernel(*[torch.zeros(1)] * 7, format="plain", expert_map=torch.zeros(1))
