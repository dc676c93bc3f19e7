"""The sum over ranks on one GPU: two ranks are two streams of it, and what one puts into the other's memory lies there.

What runs is what runs over NVLink, but for how far a put has to go: bits of every way of handing in a part, in calls
and in graphs, with other values and other numbers of rows than before.
"""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_harness.harness.core.call import Call
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.rms_norm.stage import STAGE
from moe_harness.impls.dispatchers.symmetric import Workspace
from moe_harness.impls.parallel import symmetric
from moe_harness.impls.triton._combine import combine

RANKS, EPS, FAR = 2, 1e-6, 1 << 62
WORDS = 1 << 19  # bytes that are put in words
PATIENCE = 20.0  # seconds
EXPERTS, SLOTS = 6, 4
PIECES = {"pieces": 3, "one piece": 1}
ROWS = (1, 3, 64, 130, 128, 2, 256, 1)


class OnOneGpu(symmetric.SumNorm):
    """A rank whose peers are other objects of this process."""

    def __init__(self, rank: int, in_words: int):
        from moe_harness.impls.parallel import _sum_norm

        self.rank, self.ranks, self.kernels = rank, RANKS, _sum_norm
        self.device, self.group = torch.device("cuda", torch.cuda.current_device()), None
        self.largest, self.in_words = symmetric.LARGEST, in_words
        self._space, self._started = None, {}
        self.stream = torch.cuda.Stream()

    def join(self, peers: list["OnOneGpu"]) -> None:
        """Make the workspace, with the addresses of all ranks."""
        own = self._workspace()
        for place, peer in enumerate(peers):
            own.peers[place] = peer._workspace().buffer.data_ptr()

    def _mapped(self, size: int) -> Workspace:
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        peers = torch.zeros(RANKS, dtype=torch.int64, device=self.device)
        return Workspace(buffer, peers, torch.zeros(self.kernels.PROGRAMS, dtype=torch.int64, device=self.device))


def joined(in_words: int) -> list[OnOneGpu]:
    ranks = [OnOneGpu(rank, in_words) for rank in range(RANKS)]
    for rank in ranks:
        rank.join(ranks)
    return ranks


class Case:
    """Operands of all ranks, and the same part of each handed in whole, by slots or in pieces."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, seed: int):
        draw = torch.Generator("cuda").manual_seed(seed)
        kind: dict[str, Any] = {"device": "cuda", "generator": draw}
        self.weight, self.residual = (torch.randn(*s, **kind).to(dtype) for s in ((width,), (rows, width)))
        self.parts = [torch.randn(rows, width, **kind).to(dtype) for _ in range(RANKS)]
        self.pieces = [torch.randn(max(PIECES.values()), rows, width, **kind) for _ in range(RANKS)]
        self.rows = [torch.randn(rows * SLOTS, width, **kind).to(dtype) for _ in range(RANKS)]
        self.weights = torch.rand(rows, SLOTS, **kind)
        self.ids = torch.randint(-1, EXPERTS * RANKS, (rows, SLOTS), **kind)
        self.local = [self._local(rank) for rank in range(RANKS)]

    def _local(self, rank: int) -> Tensor:
        local = torch.full((EXPERTS * RANKS,), -1, device="cuda")
        local[rank * EXPERTS : (rank + 1) * EXPERTS] = torch.arange(EXPERTS, device="cuda")
        return local

    def part(self, how: str, rank: int) -> Tensor:
        """The part as one tensor, rounded once."""
        dtype = self.weight.dtype
        if how == "part":
            return self.parts[rank]
        if how == "slots":
            return combine(self.rows[rank], self.weights, self.ids, EXPERTS, self.local[rank])
        total = torch.zeros(self.residual.shape, device="cuda")
        for piece in self.pieces[rank][: PIECES[how]]:
            total = total + piece
        return total.to(dtype)

    def run(self, through: OnOneGpu, how: str) -> tuple[Tensor, Tensor]:
        rank, given = through.rank, {"eps": EPS, "residual": self.residual}
        if how == "part":
            return through(self.parts[rank], self.weight, **given)
        if how in PIECES:
            return through.of_pieces(self.pieces[rank][: PIECES[how]], self.weight, **given)
        slots = (self.rows[rank], self.weights, self.ids, self.weight)
        return through.of_slots(*slots, num_experts=EXPERTS, local=self.local[rank], **given)

    def total(self, how: str) -> Tensor:
        total = torch.zeros(self.residual.shape, device="cuda")
        for rank in range(RANKS):
            total = total + self.part(how, rank).float()
        return (total + self.residual.float()).to(self.residual.dtype)


def together(ranks: list[OnOneGpu], case: Case, how: str) -> list[tuple[Tensor, Tensor]]:
    torch.cuda.synchronize()
    found = []
    for rank in ranks:
        with torch.cuda.stream(rank.stream):
            found.append(case.run(rank, how))
    ended(ranks)
    return found


def ended(ranks: list[OnOneGpu]) -> None:
    """Wait for both; where they wait for each other, nothing but the end of the process ends them."""
    deadline = time.monotonic() + PATIENCE
    while not all(rank.stream.query() for rank in ranks):
        if time.monotonic() > deadline:
            pytest.exit(f"two ranks on one GPU wait for each other since {PATIENCE} s", returncode=1)
        time.sleep(0.001)
    torch.cuda.synchronize()


def compiled(ranks: list[OnOneGpu], case: Case, how: str) -> None:
    """Run every rank by itself once: a kernel that waits would keep the other one from being loaded."""
    for rank in ranks:
        rank._space.buffer.view(torch.int64)[: 2 * rank.kernels.PROGRAMS * RANKS].fill_(FAR)
    for rank in ranks:
        case.run(rank, how)
        torch.cuda.synchronize()
    for rank in ranks:
        rank._space.buffer.zero_()
        rank._space.epochs.zero_()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["part", "slots", *PIECES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("in_words", [0, WORDS], ids=["rows", "words"])
def test_both_ranks_hold_the_sum_and_its_norm(in_words: int, dtype: torch.dtype, how: str) -> None:
    width = 2048 if dtype == torch.bfloat16 else 515
    ranks = joined(in_words)
    compiled(ranks, Case(ROWS[0], width, dtype, 0), how)
    if in_words:  # the largest of them are put as rows
        ranks[0].in_words = ranks[1].in_words = 0
        compiled(ranks, Case(ROWS[0], width, dtype, 0), how)
        ranks[0].in_words = ranks[1].in_words = in_words
    for seed, rows in enumerate(ROWS * 3):
        case = Case(rows, width, dtype, seed)
        (out, total), (other_out, other_total) = together(ranks, case, how)
        assert torch.equal(total, other_total) and torch.equal(out, other_out), f"call {seed}: the ranks differ"
        wanted = case.total(how)
        assert torch.equal(total, wanted), f"call {seed}, {rows} rows: {int((total != wanted).sum())} sums are others"
        given = {"x": total, "weight": case.weight}
        norm = Call(
            RmsNormCase(dtype="bf16" if dtype == torch.bfloat16 else "fp32"), given, {"eps": EPS, "residual": None}
        )
        assert not (told := STAGE.judge(norm, out, ()).findings), f"call {seed}: {told[0].message}"


@pytest.mark.gpu
@pytest.mark.parametrize("in_words", [0, WORDS], ids=["rows", "words"])
def test_graphs_replayed_with_other_values(in_words: int) -> None:
    """Each rank's graph holds three calls; what they say is compared after every replay."""
    ranks, case = joined(in_words), Case(64, 2048, torch.bfloat16, 0)
    compiled(ranks, case, "part")
    graphs, results = [], []
    for rank in ranks:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream):
            results.append([case.run(rank, "part") for _ in range(3)])
        graphs.append(graph)
    for seed in range(1, 30):
        other = Case(64, 2048, torch.bfloat16, seed)
        for rank in range(RANKS):
            case.parts[rank].copy_(other.parts[rank])
        case.residual.copy_(other.residual)
        torch.cuda.synchronize()
        for rank, graph in zip(ranks, graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()
        ended(ranks)
        wanted = case.total("part")
        for found in results:
            assert all(torch.equal(total, wanted) for _, total in found), f"replay {seed}"
