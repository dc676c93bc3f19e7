"""A layer that is captured in a CUDA graph at its first call for a shape and replayed from then on.

With few tokens a layer's time is mostly that of starting its kernels one by one; replayed, the host copies the
arguments and starts one graph.  The layer may read nothing back to the host: its dispatcher has to be one whose shapes
depend on a bound, or on numbers of tokens that are known.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.capturing import capturing


def capture(layer: Callable[[], Any], group: dist.ProcessGroup | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of `layer` on the current GPU, and the result that its replays write.  Collective over `group`.

    Raises:
        RuntimeError: from torch, where the layer waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()  # compiles, allocates and connects what cannot be done while capturing
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier(group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own threads look at events meanwhile, which only a capture of this thread alone allows.
    with capturing(graph, capture_error_mode="thread_local"):
        result = layer()
    return graph, result


class Replayed:
    """`layer` with the same arguments and results; one graph for each set of shapes.

    Args:
        layer: of tensors, to one tensor.
        group: the ranks that the layer's collectives join; all of them have to come to a new shape together.
    """

    def __init__(self, layer: Callable[..., Tensor], group: dist.ProcessGroup | None = None):
        self.layer, self.group = layer, group
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        """A new tensor in each call."""
        kind = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if kind not in self.captured:
            own = [tensor.clone() for tensor in given]
            graph, result = capture(lambda: self.layer(*own), self.group)
            self.captured[kind] = (graph, own, result)
        graph, own, result = self.captured[kind]
        for target, value in zip(own, given, strict=True):
            target.copy_(value)
        graph.replay()
        return result.clone()
