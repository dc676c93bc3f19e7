"""Wrong outputs made from a right one: what any judgement worth its name rejects.

A stage's `wrong.py` makes what plausible mistakes return on the data of one call, in fp64.  They guard the data
(`harness.run.data_power`: a case on which one of them passes cannot judge) and measure other people's tolerances
(`harness.proof.audit`).  One that cannot differ for a call's shape and flags (no slot to drop when nothing is routed)
is left out; one that merely happens not to differ on the data is kept, for that is what the power check must find.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Wrong = dict[str, Any]  # name -> a result


class Excuse(NamedTuple):
    """Cases whose data cannot tell a wrong output (ALL: any of them) from a right one, whatever is drawn, and why."""

    wrong: str
    holds: Callable[[Any], bool]
    why: str


ALL = "all"


def common(value: Tensor) -> Wrong:
    """Mistakes that need only the right value [rows, columns]."""
    if not value.numel():
        return {}
    filled = value.any(-1).nonzero()[:, 0].tolist() or [0]  # a row of zeros cannot be lost
    row = filled[len(filled) // 2]
    zeroed, off = value.clone(), value.clone()
    zeroed[row] = 0.0
    off[row, value.shape[-1] // 2] += value.abs().max()
    return {
        "all_zeros": value.new_zeros(value.shape),
        "doubled": 2 * value,
        "one_row_zeroed": zeroed,
        "one_element_off": off,
    }


def without_last(hidden: Tensor, columns: int) -> Tensor:
    """The last columns zero."""
    kept = hidden.clone()
    kept[..., -columns:] = 0.0
    return kept
