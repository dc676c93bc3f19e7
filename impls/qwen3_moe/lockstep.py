"""Attention in data parallel: every rank has sequences of its own, and all meet in the experts of every layer.

What a dispatcher does takes all ranks, so that they step together: before each step they agree whether anybody has one,
and a rank that has none goes through the layers without tokens.  The agreement is read by the host in every step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_harness.impls.qwen3_moe.engine import Engine, Running
from moe_harness.impls.qwen3_moe.ranks import Ranks
from moe_harness.impls.qwen3_moe.scheduler import Step
from moe_harness.impls.qwen3_moe.sequence import Request


class LockstepEngine(Engine):
    """An engine that runs every `size`-th request of a call, beside those of the other ranks.

    Args:
        ranks: those that share the experts.
        idle: runs all layers without tokens.
        limits: as of `Engine`.
    """

    def __init__(self, ranks: Ranks, idle: Callable[[], Any], *engine: Any, **limits: Any):
        super().__init__(*engine, **limits)
        self.ranks, self.idle, self.anybody = ranks, idle, False

    def launch(self, step: Step | None) -> Running | None:
        told = torch.tensor([step is not None, step is not None or self.under_way is not None], dtype=torch.int32)
        told = told.to(self.ranks.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.ranks.group)
        some_step, self.anybody = map(bool, told.tolist())
        if some_step and step is None:
            self.idle()
        return super().launch(step)

    def generate(self, requests: list[Request], progress: Callable[[int, int], None] | None = None) -> list[list[int]]:
        """As of `Engine`, with the same requests on every rank; progress is told at the end."""
        self.refuse_any(requests)  # on all ranks, whoever would run it
        size, found = self.ranks.size, super().generate(requests[self.ranks.rank :: self.ranks.size])
        self.anybody = True
        while self.anybody:
            self.step()
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, found, group=self.ranks.group)
        if progress is not None:
            progress(len(requests), len(requests))
        return [parts[place % size][place // size] for place in range(len(requests))]
