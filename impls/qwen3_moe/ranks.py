"""What the ranks of one model say to each other: sums, gathers, and the token that wins over all shards.

Every rank plans every step for itself from the same requests, so that no step is sent around: there is no buffer of
commands that could be overwritten before it is read, and no rank waits for another one's plan.  What the plans follow
from is made equal instead: pages are as many as the rank with the fewest has, requests are compared when they come,
and with each step's candidates goes a fingerprint of its plan, which costs no collective of its own.
"""

import hashlib
import os
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import all_gather, gather_rows
from moe_harness.impls.parallel.reduction import PARTIAL, reduction

DISAGREE = -2  # instead of a token, less the number of the first rank whose plan is another than rank 0's


REAPED = 0.5  # seconds in which the end of a process, whose connections are closed already, has to show


class RanksDiffer(RuntimeError):
    """Ranks that were to do the same thing do not; raised on all of them."""


class RankLost(RuntimeError):
    """A rank has ended while others wait for it."""


class SumNorm(Protocol):
    """`impls.parallel.symmetric.SumNorm`."""

    def fits(self, shape: Sequence[int], dtype: torch.dtype) -> bool: ...

    def __call__(
        self, part: Tensor, weight: Tensor | None = None, *, eps: float = 0.0, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def of_pieces(self, pieces: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def of_slots(
        self, rows: Tensor, topk_weights: Tensor, topk_ids: Tensor, weight: Tensor, *, eps: float, residual: Tensor,
        num_experts: int, local: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class Ranks:
    """This rank among those of `group`.  A collective.

    Attributes:
        sum_norm: makes sums through symmetric memory, with the norm behind them; None: they are the group's all_reduce.
        capturable: whether the group's collectives can be part of a CUDA graph: gloo's go through the host.
    """

    sum_norm: SumNorm | None = None

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.capturable = dist.get_backend(group) == "nccl"
        own = torch.tensor([zlib.crc32(socket.gethostname().encode()), os.getpid()], device=device)
        found = own.new_empty(self.size * 2)
        all_gather(found, own, group)
        self.processes: list[list[int]] = found.view(-1, 2).tolist()  # host and process of each rank

    def reach_each_other(self) -> bool:
        """Whether all ranks are on GPUs of one host that read and write each other's memory.  A collective.

        A process to which other ranks' GPUs are not visible cannot tell, and says no.
        """
        own = self.device.index if self.device.index is not None else torch.cuda.current_device()
        visible = range(torch.cuda.device_count())
        reached = len(visible) >= self.size and all(
            torch.cuda.can_device_access_peer(own, other) for other in visible if other != own
        )
        told = torch.tensor([reached], dtype=torch.int64, device=self.device)
        return len({host for host, _ in self.processes}) == 1 and bool(self.gathered(told).all())

    def reduced(self, partial: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each: every router after it chooses alike."""
        return reduction(partial, None, self.group, routed_state=PARTIAL)

    def sums_in_the_norm(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether the norm behind a partial result of this size sums it; the same on every rank."""
        return self.sum_norm is not None and self.sum_norm.fits(shape, dtype)

    def columns(self, own: Tensor, widths: Sequence[int]) -> Tensor:
        """All columns of a matrix of which each rank has the next ones: own [T, widths[rank]] -> [T, sum]."""
        gathered = gather_rows(own.t().contiguous(), widths, self.group)
        return gathered.t().contiguous()

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """All rows of a matrix of which each rank has the next ones: own [counts[rank], H] -> [sum, H]."""
        return gather_rows(own, counts, self.group)

    def total(self, numbers: Tensor) -> Tensor:
        """int64 [...], the sum over the ranks' shards of the vocabulary (`impls.torch.cut.Shards`)."""
        found = numbers.clone()
        dist.all_reduce(found, group=self.group)
        return found

    def before(self, numbers: Tensor) -> Tensor:
        """int64 [B], the sum over the shards of the ranks before this one."""
        gathered = numbers.new_empty(self.size * len(numbers))
        all_gather(gathered, numbers.contiguous(), self.group)
        return gathered.view(self.size, -1)[: self.rank].sum(0)

    def largest(self, values: Tensor) -> Tensor:
        """[B], the largest of the ranks'."""
        found = values.clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found

    def gathered(self, own: Tensor) -> Tensor:
        """[R * n], equally many numbers of every rank, in their order."""
        found = own.new_empty(self.size * len(own))
        all_gather(found, own, self.group)
        return found

    def winner(self, tops: Tensor, scores: Tensor, tokens: Tensor, inverse: Tensor, plan: Tensor) -> Tensor:
        """The token [B] with the best score over all shards.

        Args:
            tops, scores, tokens: [B] of this rank's shard: its largest logit, the score of its best token relative to
                that logit, and the token.
            inverse: [B], 1 / temperature, by which logits enter scores.
            plan: int64 [1], the fingerprint of the step.

        Returns:
            int64 [B]; all DISAGREE - r where rank r is the first that has planned another step than rank 0.
        """
        words = [tops.double().view(torch.int64), scores.double().view(torch.int64), tokens.long()]
        gathered = self.gathered(torch.cat((plan, torch.stack(words).flatten())))
        plans, candidates = gathered.view(self.size, -1).split((1, 3 * len(tokens)), dim=1)
        top, score, token = candidates.reshape(self.size, 3, -1).unbind(1)
        top, score = top.contiguous().view(torch.float64), score.contiguous().view(torch.float64)
        relative = score + (top - top.amax(0)) * inverse.double()  # every score relative to the largest logit of all
        best = relative.masked_fill(top == -torch.inf, -torch.inf).argmax(0)  # of equal ones the first shard's
        chosen = token.gather(0, best[None])[0]
        differs = (plans != plans[0])[:, 0]
        return torch.where(differs.any(), DISAGREE - differs.int().argmax(), chosen)

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """A collective that fails because another rank's process has ended says which one.

        Raises:
            RankLost: within REAPED seconds of the collective's own error, for ranks of this host.
        """
        try:
            yield
        except RuntimeError as error:
            deadline = time.monotonic() + REAPED
            while not (lost := self._lost()) and time.monotonic() < deadline:
                time.sleep(0.01)
            if not lost:
                raise
            raise RankLost(
                f"rank {', '.join(f'{rank} (process {self.processes[rank][1]})' for rank in lost)} of {self.size} has "
                f"ended while rank {self.rank} waited for it; what it said last tells why"
            ) from error

    def _lost(self) -> list[int]:
        host = self.processes[self.rank][0]
        return [rank for rank, (place, process) in enumerate(self.processes) if place == host and not _runs(process)]

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        agreed = torch.tensor([number], device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.group)
        return int(agreed)

    def same(self, what: str, told: Any) -> None:
        """Compare what every rank was given.

        Raises:
            RanksDiffer: on every rank; which ranks were given something else than rank 0.
        """
        digest = hashlib.blake2b(repr(told).encode(), digest_size=7).digest()
        own = torch.tensor([int.from_bytes(digest, "big")], device=self.device)
        found = own.new_empty(self.size)
        all_gather(found, own, self.group)
        others = [rank for rank, number in enumerate(found.tolist()) if number != found[0]]
        if others:
            raise RanksDiffer(
                f"{what} of rank {', '.join(map(str, others))} differ from those of rank 0, wanted the same call on "
                f"all {self.size} ranks"
            )


def _runs(process: int) -> bool:
    """Whether a process of this host is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def share(count: int, ranks: int) -> list[int]:
    """`count` rows over so many ranks in order, the first ones taking one more where it does not divide."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]
