"""What one rank does to compare whole decoding steps in CUDA graphs with the same steps called, and with one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.ranked_task import Rank
from moe_harness.impls.qwen3_moe import model as engine
from moe_harness.impls.qwen3_moe.model import Model
from moe_harness.suites.model.ranked_tasks import IDS, digest, load, padded_step

SEQUENCES = 11
PROMPTS = [[(7 * n + 5 * p) % 128 for p in range(1 + n)] for n in range(SEQUENCES)]
COUNTS = [3 + 2 * n for n in range(SEQUENCES)]  # they end one after the other: every bucket, every number of pads
LIMITS: dict[str, Any] = {"max_sequences": SEQUENCES, "max_tokens": 24, "pages": 120, "max_length": 60}


def tokens_of(model: Model) -> dict[str, Any]:
    """Greedy and drawn tokens of PROMPTS, and the sizes of the graphs that gave them."""
    found: dict[str, Any] = {"greedy": model.generate(PROMPTS, max_new_tokens=COUNTS, ignore_eos=True)}
    found["drawn"] = model.generate(PROMPTS, max_new_tokens=COUNTS, ignore_eos=True, temperature=8.0, seed=3)
    model.engine.check()
    return found | {"graphs": sorted(model.engine.runner.graphs)}


def compared(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Task: tokens in graphs, called, and on rank 0 of one rank; the logits of IDS, on rank 0 alone, and their digest.

    Logits leave as nested lists: what goes through the pipe is plain data.
    """
    spread = load(spec, me.group, **LIMITS)
    logits = spread(torch.tensor(IDS))
    found: dict[str, Any] = {"digest": digest(logits), "graphed": tokens_of(spread)}
    found["called"] = tokens_of(load(spec, me.group, **LIMITS, graphs=False))
    if me.rank == 0:
        found["logits"] = logits.double().cpu().tolist()
        found["one"] = tokens_of(load(spec, **LIMITS))
    return found


def replayed_logits(me: Rank, spec: dict[str, Any], seed: int) -> list[str]:
    """Task: a step's logits in a graph and called, bit for bit, with other sequences than it was captured with.

    A CPU has no graphs: there the step is called twice.
    """
    told = []
    for size in (1, 3, 8):
        graphed, called = _last_logits(load(spec, me.group, **LIMITS), size)
        if not torch.equal(graphed, called):
            told.append(f"{size} sequences: {int((graphed != called).sum())} of {graphed.numel()} logits differ")
    return told


def _last_logits(model: Model, size: int) -> tuple[Tensor, Tensor]:
    """The logits of the fourth decoding step of `size` sequences, replayed and then called, with pads up to a bucket.

    Both write the same keys and values to the same pages.  Steps before them would differ: without graphs they have no
    pads, and products of another size are summed in another order.
    """
    runner = model.engine.runner
    for request in model.requests(PROMPTS[:size], 9, ignore_eos=True):
        model.engine.add(request)
    for _ in range(5):
        model.engine.step()
    step = model.engine.scheduler.plan()
    assert step is not None and step.decoding == len(step.work) == size
    bucket = next(b for b in (1, 3, 8, SEQUENCES) if b >= size)

    def replayed() -> Tensor:
        graph, logits, _ = runner.graphs[bucket]
        graph.replay()
        return logits

    def called() -> Tensor:
        return runner.run(type(filled)(bucket, bucket, bucket, bucket, cut=False), padded=True)[0]

    with torch.inference_mode():
        before = runner.last_tokens.clone()
        if runner.buckets:
            runner.capture(bucket)
            runner.last_tokens.copy_(before)
        filled = runner.builder.carry(step, bucket)
        first = (replayed if runner.buckets else called)()[:size].clone().cpu()
        runner.last_tokens.copy_(before)
        return first, called()[:size].clone().cpu()


def joined_step(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Task: the logits of a padded decoding step on Triton's kernels, interpreted, with what they join over ranks.

    Returns:
        The ids of the sequence so far, the logits behind them, and how the sums over ranks were asked for.
    """
    asked: list[str] = []

    from moe_harness.suites.reduction.interpreted import SumNorm  # which has all kernels of the process interpreted

    class Watched(SumNorm):
        def of_slots(self, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
            asked.append("slots")
            return super().of_slots(*given, **options)

        def of_pieces(self, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
            asked.append("pieces")
            return super().of_pieces(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "symmetric_sums", lambda ranks, demanded: Watched(ranks.group))
        model = load(spec, me.group, kernels="triton", symmetric=True)
    first = model.generate([[5, 6, 7]], max_new_tokens=1, ignore_eos=True)[0]
    asked.clear()
    _, logits = padded_step(model)
    return {"ids": [5, 6, 7, *first], "logits": logits.double().tolist(), "asked": asked}
