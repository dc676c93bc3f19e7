"""Results as matrices, and some rows of them."""

from typing import Any

from torch import Tensor

from moe_harness.harness.core.bounds import Bound


def matrix(tensor: Tensor) -> Tensor:
    """Leading dimensions flattened, a vector as one row; apart from any graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def of_result(result: Any, rows: Tensor) -> Any:
    """These rows of what an implementation returned, a tensor or a tuple of them."""
    return tuple(matrix(r)[rows] for r in result) if isinstance(result, tuple) else matrix(result)[rows]


def truth_of(truth: Any, rows: Tensor) -> Any:
    """These rows of what is right, one truth or a tuple of them; None where it is not known."""
    if isinstance(truth, tuple):
        return tuple(truth_of(one, rows) for one in truth)
    if isinstance(truth, Bound):
        return truth.part(rows)
    return None if truth is None else matrix(truth)[rows]
