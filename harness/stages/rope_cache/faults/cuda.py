"""Faults that need a GPU: what a graph keeps, and which stream writes the cache."""

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.rope_cache.faults._steps import run

CUDA = ("cuda",)
_kept: dict[tuple[object, ...], Tensor] = {}  # what the stateful fault keeps between calls


def write_without_waiting(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Rows [T, Hk, D] to their slots, by the device alone, so that it can be captured in a graph."""
    everywhere = torch.arange(cache.shape[0] * cache.shape[1], device=slots.device)
    match = slots.long() == everywhere[:, None]
    new = rows.to(cache.dtype)[match.int().argmax(1)].view(cache.shape)
    cache.copy_(torch.where(match.any(1).view(*cache.shape[:2], 1, 1), new, cache))


def run_captured(*call: Tensor, **options: object) -> Tensor:
    """A right implementation without any synchronisation; T above 0."""
    return run(*call, **options, write=write_without_waiting)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@fault(
    "graph", condition="replay with other slots", shows=None, devices=CUDA, graph_capturable=True, stateful=True
)  # fmt: skip
def slots_of_the_capture(*call: Tensor, **options: object) -> Tensor:
    """Slots are read on the host: every replay writes where the capture wrote, over other sequences' keys."""

    def write(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        if not capturing():
            _kept[slots.shape, slots.dtype] = slots.clone()
        write_without_waiting(cache, _kept.get((slots.shape, slots.dtype), slots), rows)

    return run(*call, **options, write=write)


@fault("streams", condition="called on a stream other than the default one", shows=None, devices=CUDA)
def cache_written_on_another_stream(*call: Tensor, **options: object) -> Tensor:
    """The cache is written on the default stream whatever the caller's is, before the keys have arrived."""

    def write(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        with torch.cuda.stream(torch.cuda.default_stream(slots.device)):
            write_without_waiting(cache, slots, rows)

    return run(*call, **options, write=write)
