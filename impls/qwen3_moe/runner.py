"""Runs planned steps on the device: a CUDA graph for decoding, plain calls for steps with chunks.

A graph holds a whole step, from token ids to sampled tokens, for one of BUCKETS many sequences; a smaller batch is
padded. The tokens stay on the device, each in its sequence's row, where the next step finds them; a copy goes to the
host, which reads it while the next step runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.capturing import capturing
from moe_harness.impls.qwen3_moe.batch import ON_DEVICE, Builder, Filled, Limits
from moe_harness.impls.qwen3_moe.network import Cache, Flat, Network
from moe_harness.impls.qwen3_moe.ranks import DISAGREE, RanksDiffer
from moe_harness.impls.qwen3_moe.scheduler import Step

# With pad rows routed nowhere these cost as little as finer ones (0.5 % of the time of a trace of 256 requests).
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LARGEST_STEP = 256  # between buckets beyond the last one


def buckets(sequences: int) -> list[int]:
    """Sizes of graphs for up to so many sequences; the last one holds them all."""
    found = [size for size in BUCKETS if size < sequences]
    found += range(BUCKETS[-1] + LARGEST_STEP, sequences, LARGEST_STEP)
    return [*found, sequences]


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    step: Step
    tokens: Tensor  # on the host, once `done`
    done: torch.cuda.Event | None

    def result(self) -> list[int]:
        """The sampled tokens, as soon as they are there.

        Raises:
            RanksDiffer: on every rank, where one has planned another step.
        """
        if self.done is not None:
            self.done.synchronize()
        tokens = self.tokens.tolist()
        if tokens and tokens[0] <= DISAGREE:
            raise RanksDiffer(f"rank {DISAGREE - tokens[0]} has planned another step than rank 0, wanted the same")
        return tokens


class Runner:
    """One rank's device.

    Args:
        graphs: whether decoding steps are captured; on a GPU only.
    """

    def __init__(self, network: Network, cache: Cache, limits: Limits, device: torch.device, graphs: bool = True):
        self.network, self.cache, self.limits, self.device_of = network, cache, limits, device
        self.builder = Builder(limits, device)
        self.block = self.builder.device
        # One row more than there are sequences: pad rows write their token there.
        self.last_tokens = torch.zeros(limits.sequences + 1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self.hosts = [torch.zeros(limits.sequences, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.turn = 0
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool: Any = None  # memory that all graphs share
        self.buckets = buckets(limits.sequences) if graphs and pinned else []

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start a step; returns before it has ended."""
        only_decoding = step.decoding == len(step.work)
        bucket = next((b for b in self.buckets if b >= len(step.work)), 0) if only_decoding else 0
        if bucket and bucket not in self.graphs:
            self.capture(bucket)
        filled = self.builder.carry(step, bucket)
        if bucket:
            graph, logits, tokens = self.graphs[bucket]
            graph.replay()
        else:
            logits, tokens = self.run(filled)
        if filled.cut:
            tokens = self._sample(logits, filled.sampling, cut=True)
        host = self.hosts[self.turn][: filled.sampling]
        self.turn = (self.turn + 1) % len(self.hosts)
        host.copy_(tokens[: filled.sampling], non_blocking=True)
        done = None
        if self.device_of.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Launched(step, host, done)

    def run(self, filled: Filled, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and tokens [R] of the step in the block."""
        b, t, s, d = self.block, filled.tokens, filled.sequences, filled.decoding
        ids, decoding = b["ids"][:t], b["ids"][:d]
        sampled = self.last_tokens[b["rows"][:d]]  # those that decode come first among those that sample
        ids = torch.cat((torch.where(decoding == ON_DEVICE, sampled, decoding), ids[d:]))
        flat = Flat(
            b["positions"][:t], b["slots"][:t], b["query_start"][: s + 1], b["context"][:s], b["tables"][:s], d, padded,
            b["states"][:s],
        )  # fmt: skip
        rows = None if t == filled.sampling else b["last"][: filled.sampling]
        logits = self.network(ids, flat, self.cache, rows)
        return logits, self._sample(logits, filled.sampling)

    def _sample(self, logits: Tensor, count: int, cut: bool = False) -> Tensor:
        """Tokens [R], left in their rows too."""
        b = self.block
        given = {
            "temperature": b["temperature"][:count], "seeds": b["seeds"][:count], "positions": b["draws"][:count],
        }  # fmt: skip
        cuts = {"top_k": b["top_k"][:count], "top_p": b["top_p"][:count]} if cut else {}
        tokens = self.network.sample(logits[:count], given, cuts, b["plan"])
        self.last_tokens.index_copy_(0, b["rows"][:count], tokens.long())
        return tokens

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Capture the graph of a bucket, when a step first needs it: few prompts never need most of them."""
        filled = Filled(size, size, size, size, cut=False)
        torch.cuda.synchronize(self.device_of)  # the blocks of steps under way have arrived
        self._blank(size)
        self.run(filled, padded=True)  # whatever is compiled or allocated once, is now
        torch.cuda.synchronize(self.device_of)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own threads look at events meanwhile, which only a capture of this thread alone allows.
        with capturing(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits, tokens = self.run(filled, padded=True)
        self.pool = graph.pool()
        self.graphs[size] = (graph, logits, tokens)

    @torch.inference_mode()
    def idle(self) -> None:
        """Go through all layers without tokens, for the sake of other ranks."""
        b = self.block
        flat = Flat(b["positions"][:0], b["slots"][:0], torch.zeros_like(b["query_start"][:1]), b["context"][:0],
                    b["tables"][:0], 0, rows=b["states"][:0])  # fmt: skip
        self.network(b["ids"][:0], flat, self.cache)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the largest step on nothing, so that the memory it needs is known; it writes no keys."""
        self._blank(self.limits.sequences)
        t = self.limits.tokens
        self.block["positions"].zero_()
        self.block["ids"].zero_()
        self.block["slots"].fill_(-1)
        self.block["query_start"][:2] = torch.tensor([0, t], dtype=torch.int32)
        self.block["last"].zero_()
        self.run(Filled(t, 1, 0, 1, cut=False))

    def _blank(self, size: int) -> None:
        """A block of pad rows alone."""
        _, fields = self.builder.hosts[0]
        self.builder._pad(fields, 0, size)
        fields["query_start"][0] = 0
        self.builder.block.copy_(self.builder.hosts[0][0])
