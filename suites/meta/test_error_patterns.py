"""What a wrong result looks like, in words: which elements are wrong, and how they relate to the right ones."""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.error_patterns import structure


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (range(16), "all 16 rows hold wrong elements"),
        ([4], "only row 4 of 16 holds wrong elements"),
        (range(3, 9), "wrong rows are 3 to 8 of 16"),
        (range(9, 16), "wrong rows are 9 to 15 of 16, up to the last"),
        (range(2, 16, 3), "one row in 3 is wrong, from 2 on"),
        ([1, 2, 7], "3 of 16 rows hold wrong elements: [1, 2, 7]"),
        ([8, 9, 10, 11, 12, 13, 15], "7 of 16 rows hold wrong elements, none before 8: [8, 9, 10, 11, 12, 13] ..."),
    ],
)
def test_the_places_of_wrong_elements_are_told(rows, words: str) -> None:
    class Stage:
        def row_groups(self, call: object) -> dict[str, Tensor]:
            return {}

    value = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, wrong = value.clone(), torch.zeros(16, 8, dtype=torch.bool)
    wrong[list(rows), ::2] = True
    out[wrong] = -value.flip(1)[wrong] - 2.0
    assert words in structure(Stage(), None, value, out, wrong)
    assert words.replace("row", "column") in structure(Stage(), None, value.T, out.T, wrong.T)


def test_a_rounding_is_no_factor() -> None:
    value = torch.linspace(1, 2, 640, dtype=torch.float64).reshape(10, 64)
    assert not any("times" in told for told in structure(None, None, value, value.bfloat16(), value > 0))


@pytest.mark.parametrize(("dtype", "words"), [("bfloat16", "8 bits (bf16"), ("float16", "11 bits (fp16 or tf32")])
def test_an_error_of_the_size_of_a_rounding_is_told_in_bits(dtype: str, words: str) -> None:
    value = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told = structure(None, None, value, value.to(getattr(torch, dtype)), torch.ones_like(value, dtype=torch.bool))
    assert f"rounded to {words}" in told[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out + 0.01, "the value plus 0.01"),
        (lambda out: out.index_copy(0, torch.tensor([1]), out[:1]), "one of the rows is another one: 1 holds 0"),
        (lambda out: out.roll(16, 1), "columns are permuted: 0 holds 48"),
        (lambda out: out * 0.5, "the value times 0.5"),
    ],
)
def test_simple_changes_of_the_result_are_seen(change, words: str) -> None:
    value = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = change(value)
    assert words in "; ".join(structure(None, None, value, out, out != value))
