"""Faults of the one reduction: functions in the place of the right one, and the fit that names them.

Each takes (routed, shared, group, rows) with `.tensor` and `.state.name` (PARTIAL, REPLICATED, COMPLETE) and returns
this rank's output; `expect` is the (a, b) of  output = a * Routed + b * Shared  over n ranks, None where no such fit
exists because ranks hold unequal parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LayoutFault:
    """A wrong cell of the table of the one reduction."""

    name: str
    function: Callable[..., Tensor]
    shared_sharded: bool  # the layout that it is a fault of
    expect: Callable[[int], tuple[float, float] | None]
    source: str

    @property
    def spec(self) -> str:
        return f"{self.function.__module__}:{self.name}"


LAYOUT_FAULTS: dict[str, LayoutFault] = {}


def layout_fault(
    source: str, *, shared_sharded: bool, expect: Callable[[int], tuple[float, float] | None]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter a function under its own name."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, url = function.__name__, f"https://github.com/{source}"
        LAYOUT_FAULTS[name] = LayoutFault(name, function, shared_sharded, expect, url)
        return function

    return enter


def total(tensor: Tensor, group: Any) -> Tensor:
    """The sum over `group`."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


@layout_fault("sgl-project/sglang/pull/35535", shared_sharded=False, expect=lambda n: (1, n))
def replicated_shared_summed(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return total(routed.tensor + shared.tensor, group)


@layout_fault("vllm-project/tpu-inference/pull/3435", shared_sharded=True, expect=lambda n: None)
def shared_partial_plus_routed_full(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return total(routed.tensor, group) + shared.tensor


@layout_fault("vllm-project/vllm/pull/28277", shared_sharded=True, expect=lambda n: (n, n))
def reduced_twice(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return total(total(routed.tensor + shared.tensor, group), group)


@layout_fault("sgl-project/sglang/issues/36879", shared_sharded=True, expect=lambda n: None)
def reduction_left_out(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return routed.tensor + shared.tensor


@layout_fault("vllm-project/vllm/pull/41763", shared_sharded=False, expect=lambda n: (1, 1 / n))
def shared_divided_by_ranks(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    count = dist.get_world_size(group)
    return total(routed.tensor + shared.tensor / count / count, group)


@layout_fault("NousResearch/torchtitan/pull/36", shared_sharded=False, expect=lambda n: (1, 0))
def shared_dropped(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return total(routed.tensor, group)


@layout_fault("vllm-project/vllm/pull/44313", shared_sharded=True, expect=lambda n: (1, 2))
def scale_touches_shared(routed: Any, shared: Any, group: Any, rows: Any) -> Tensor:
    return total(routed.tensor + 2 * shared.tensor, group)


def fit(output: Tensor, routed: Tensor, shared: Tensor) -> tuple[float, float, float]:
    """(a, b, residual) of the best output = a * routed + b * shared; the residual relative to the output."""
    matrix = torch.stack([routed.flatten(), shared.flatten()], 1).double()
    target = output.flatten().double()
    a, b = torch.linalg.lstsq(matrix, target[:, None]).solution.flatten().tolist()
    rest = target - matrix @ torch.tensor([a, b], dtype=torch.float64)
    return a, b, float(rest.norm() / target.norm().clamp(min=1e-30))


def name_fit(a: float, b: float, residual: float, ranks: int) -> str:
    """What a fit says about the reduction over `ranks`."""
    if residual > 1e-3:
        return "no multiple of routed and shared part: a reduction is missing, or parts of different tokens were added"
    known = {(1.0, 1.0): "right", (1.0, float(ranks)): f"shared expert counted {ranks} times",
             (float(ranks), float(ranks)): "reduced twice", (1.0, 1 / ranks): "shared expert lost on all ranks but one",
             (1.0, 0.0): "shared expert missing", (float(ranks), 1.0): "routed part reduced twice"}  # fmt: skip
    nearest = (round(a, 3), round(b, 3))
    return next((words for pair, words in known.items() if nearest == tuple(round(p, 3) for p in pair)),
                f"routed part counts {a:.3g} times, shared part {b:.3g} times")  # fmt: skip
