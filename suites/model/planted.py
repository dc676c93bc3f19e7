"""Bugs of small engines that were published, planted here as the smallest change, each with its address.

Those that only exist over several ranks, and the one that lives in a kernel (an empty split), are not here.  `where`
says which check sees a fault: the state machine, the network on a tiny checkpoint, or a check of one function.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pytest import MonkeyPatch

from moe_harness.impls.qwen3_moe import batch, config, engine, runner
from moe_harness.impls.qwen3_moe.kernels import Kernels
from moe_harness.impls.qwen3_moe.network import Network
from moe_harness.impls.qwen3_moe.pages import ROOT, Pages
from moe_harness.impls.qwen3_moe.scheduler import Scheduler, Step, Work
from moe_harness.impls.qwen3_moe.sequence import Request, Sequence, Status
from moe_harness.suites.model.planting import FAULTS, MS, NV, V, around, fault

__all__ = ["FAULTS"]


def after_fill(patch: MonkeyPatch, change: Callable[[batch.Builder, Step, dict[str, np.ndarray]], None]) -> None:
    """Change the fields of a step after they were filled."""

    def fill(original: Callable, self: batch.Builder, step: Step, to: dict[str, np.ndarray]) -> batch.Filled:
        filled = original(self, step, to)
        change(self, step, to)
        return filled

    around(patch, batch.Builder, "_fill", fill)


@fault(f"{NV}/issues/212, {NV}/pull/213")
def keys_of_the_whole_prompt_in_a_chunk(patch: MonkeyPatch) -> None:
    def change(builder: batch.Builder, step: Step, to: dict[str, np.ndarray]) -> None:
        for s, work in enumerate(step.work):
            to["context"][s] = max(to["context"][s], len(work.sequence.tokens))

    after_fill(patch, change)


@fault(f"{NV}/issues/144, {NV}/pull/103")
def resumed_with_its_last_token_alone(patch: MonkeyPatch) -> None:
    def admit(original: Callable, self: Scheduler) -> Sequence | None:
        sequence = original(self)
        if sequence is not None and sequence.new_tokens:
            sequence.computed = len(sequence.tokens) - 1
        return sequence

    around(patch, Scheduler, "_admit", admit)


@fault(f"{NV}/pull/217, {NV}/pull/211")
def sampled_token_dropped_by_a_preemption(patch: MonkeyPatch) -> None:
    def preempt(original: Callable, self: Scheduler, sequence: Sequence) -> None:
        original(self, sequence)
        if sequence.new_tokens:
            sequence.tokens.pop()

    around(patch, Scheduler, "_preempt", preempt)


@fault(f"{NV}/issues/144, {NV}/pull/199")
def nothing_left_to_compute_of_a_known_prompt(patch: MonkeyPatch) -> None:
    around(patch, Pages, "match", lambda original, self, tokens: original(self, [*tokens, 0]))


@fault(f"{NV}/pull/207, {NV}/pull/210, {NV}/pull/233")
def tokens_counted_before_the_known_prefix(patch: MonkeyPatch) -> None:
    def count(original: Callable, self: Scheduler, sequence: Sequence, n: int) -> Work:
        first = sequence.computed == sequence.known * self.pages.size and not sequence.new_tokens
        return original(self, sequence, min(len(sequence.tokens), n + sequence.computed) if first else n)

    around(patch, Scheduler, "_count", count)


@fault(f"{NV}/issues/208, {NV}/pull/209")
def known_before_it_is_computed(patch: MonkeyPatch) -> None:
    def admit(original: Callable, self: Scheduler) -> Sequence | None:
        sequence = original(self)
        if sequence is not None:
            computed, sequence.computed = sequence.computed, len(sequence.tokens)
            self._remember(sequence)
            sequence.computed = computed
        return sequence

    around(patch, Scheduler, "_admit", admit)


@fault(f"{NV}/issues/219, {NV}/pull/243")
def same_prefix_twice_overwrites_the_first(patch: MonkeyPatch) -> None:
    def remember(original: Callable, self: Pages, before: int, tokens: tuple[int, ...], page: int) -> int:
        self.known.pop((before, tokens), None)
        return original(self, before, tokens, page)

    around(patch, Pages, "remember", remember)


@fault(f"{NV}/issues/219, {NV}/pull/243")
def forgotten_page_still_found(patch: MonkeyPatch) -> None:
    patch.setattr(Pages, "_forget", lambda self, page: (self.key_of.pop(page, None), self.identity.pop(page, None)))


@fault(f"{NV}/issues/190, {NV}/issues/106, {NV}/pull/258")
def tables_of_the_step_before_stay(patch: MonkeyPatch) -> None:
    def row(original: Callable, self: batch.Builder, place: int, table: list[int]) -> int:
        if self.filled[place] >= len(table):
            self.owners[place] = table
        return original(self, place, table)

    around(patch, batch.Builder, "_row", row)


@fault(f"{NV}/issues/190, {NV}/pull/258")
def no_column_for_the_first_token_after_the_longest_prompt(patch: MonkeyPatch) -> None:
    def init(original: Callable, self: batch.Limits, tokens: int, sequences: int, columns: int, page_size: int) -> None:
        original(self, tokens, sequences, max(1, columns - 1), page_size)

    around(patch, batch.Limits, "__init__", init)


@fault(f"{NV}/pull/216", "function")
def graphs_do_not_cover_every_batch(patch: MonkeyPatch) -> None:
    patch.setattr(runner, "buckets", lambda n: [size for size in (1, 2, 4, 8, *range(16, 513, 16)) if size <= n])


@fault(f"{NV}/pull/205, {NV}/pull/169", "network")
def norm_writes_into_its_input(patch: MonkeyPatch) -> None:
    def norm(self: Network, name: str, x: torch.Tensor, stream: torch.Tensor | None = None) -> tuple:
        total = x if stream is None else x + stream
        scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + self.config.eps)
        total.mul_(scale)
        return total * self.p[name], total

    patch.setattr(Network, "norm", norm)


@fault(f"{NV}/pull/249", "network")
def temperature_zero_divides(patch: MonkeyPatch) -> None:
    after_fill(patch, lambda builder, step, to: to["temperature"].__setitem__(slice(0, len(step.work)), 1.0))


@fault("github.com/Wenyueh/MinivLLM/pull/12")
def one_token_too_many(patch: MonkeyPatch) -> None:
    def add(original: Callable, self: engine.Engine, request: Request) -> int:
        return original(self, replace(request, max_new_tokens=request.max_new_tokens + 1))

    around(patch, engine.Engine, "add", add)


@fault("github.com/Wenyueh/MinivLLM/pull/12")
def one_token_too_few(patch: MonkeyPatch) -> None:
    def complete(self: Sequence) -> bool:
        return self.length >= len(self.request.prompt) + max(1, self.request.max_new_tokens - 1)

    patch.setattr(Sequence, "complete", property(complete))


@fault(f"{NV}/pull/182, {NV}/pull/198, {NV}/pull/214", "function")
def scaled_angles_ignored(patch: MonkeyPatch) -> None:
    patch.setattr(config._Reader, "_theta", lambda self: float(self.keys.get("rope_theta", 10000.0)))


@fault(f"{MS}/pull/142")
def duplicate_freed_while_in_use(patch: MonkeyPatch) -> None:
    def remember(original: Callable, self: Pages, before: int, tokens: tuple[int, ...], page: int) -> int:
        twice = self.known.get((before, tokens), page) != page
        identity = original(self, before, tokens, page)
        if twice and self.holders[page] == 1:
            self.release([page])
        return identity

    around(patch, Pages, "remember", remember)


@fault(f"{MS}/pull/64")
def known_pages_freed_instead_of_the_rest(patch: MonkeyPatch) -> None:
    def leave(original: Callable, self: Scheduler, sequence: Sequence) -> None:
        kept = sequence.table
        sequence.table = kept[: sequence.known] or kept
        original(self, sequence)

    around(patch, Scheduler, "_leave", leave)


@fault(f"{MS}/pull/46, {MS}/pull/52")
def matched_prefix_counts_as_the_root(patch: MonkeyPatch) -> None:
    def admit(original: Callable, self: Scheduler) -> Sequence | None:
        sequence = original(self)
        if sequence is not None:
            sequence.prefix = ROOT
        return sequence

    around(patch, Scheduler, "_admit", admit)


@fault(f"{MS}/pull/44, {MS}/pull/45")
def matched_page_not_held(patch: MonkeyPatch) -> None:
    def hold(original: Callable, self: Pages, matched: list[int]) -> None:
        original(self, matched[:-1])

    around(patch, Pages, "hold", hold)


@fault(f"{MS}/commit/94fe255")
def matched_pages_are_a_view(patch: MonkeyPatch) -> None:
    kept: dict[tuple, list[int]] = {}

    def match(original: Callable, self: Pages, tokens: list[int]) -> list[int]:
        found = original(self, tokens)
        return kept.setdefault((id(self), *found), found)

    def admit(original: Callable, self: Scheduler) -> Sequence | None:
        sequence = original(self)
        if sequence is not None:
            matched = kept[(id(self.pages), *sequence.table[: sequence.known])]
            matched[:] = sequence.table[: len(matched) + 1]
        return sequence

    around(patch, Pages, "match", match)
    around(patch, Scheduler, "_admit", admit)


@fault(f"{MS}/pull/80")
def pages_counted_as_tokens(patch: MonkeyPatch) -> None:
    around(
        patch, Pages, "cost", lambda original, self, matched: original(self, matched) - len(self.free) * (self.size - 1)
    )


@fault(f"{MS}/commit/ef4367f, {MS}/commit/14157d5")
def token_of_an_unfinished_chunk_taken(patch: MonkeyPatch) -> None:
    def count(original: Callable, self: Scheduler, sequence: Sequence, n: int) -> Work:
        work = original(self, sequence, n)
        sequence.pending += not work.samples
        return Work(work.sequence, work.start, work.count, samples=True)

    around(patch, Scheduler, "_count", count)


@fault(f"{MS}/pull/103, {MS}/pull/105, {MS}/issues/58")
def staging_block_rewritten_on_its_way(patch: MonkeyPatch) -> None:
    patch.setattr(batch, "BLOCKS", 1)


@fault(f"{MS}/commit/0e5f1e7")
def pad_rows_keep_old_ids(patch: MonkeyPatch) -> None:
    def pad(original: Callable, self: batch.Builder, to: dict[str, np.ndarray], used: int, padded: int) -> None:
        kept = to["ids"].copy()
        original(self, to, used, padded)
        to["ids"][used:padded] = kept[used:padded]

    around(patch, batch.Builder, "_pad", pad)


@fault(f"{MS}/commit/78f6511")
def temperatures_of_other_rows(patch: MonkeyPatch) -> None:
    def change(builder: batch.Builder, step: Step, to: dict[str, np.ndarray]) -> None:
        to["temperature"][: len(step.work)] = to["temperature"][0]

    after_fill(patch, change)


@fault(f"{MS}/pull/111")
def aborted_and_finished_in_one_step(patch: MonkeyPatch) -> None:
    patch.setattr(Sequence, "alive", property(lambda self: self.status is not Status.WAITING))


@fault(f"{MS}/pull/68")
def longest_sequence_beyond_the_pool(patch: MonkeyPatch) -> None:
    around(patch, Pages, "needed", lambda original, self, tokens: tokens // self.size)


@fault(f"{MS}/pull/47")
def budget_of_prompts_never_added_up(patch: MonkeyPatch) -> None:
    def plan(original: Callable, self: Scheduler) -> Step | None:
        limit = self.max_tokens
        self.max_tokens = 10 * limit
        try:
            return original(self)
        finally:
            self.max_tokens = limit

    around(patch, Scheduler, "plan", plan)


@fault(f"{MS}/pull/62")
def last_token_lost_where_it_is_no_stop(patch: MonkeyPatch) -> None:
    def complete(original: Callable, self: Scheduler, step: Step, tokens: list[int]) -> list:
        taken = original(self, step, tokens)
        return [(s, t) for s, t in taken if s.alive or t in s.request.stop_ids]

    around(patch, Scheduler, "complete", complete)


@fault(f"{MS}/issues/149", "function")
def integrity_check_checks_nothing(patch: MonkeyPatch) -> None:
    patch.setattr(engine.Engine, "check", lambda self: None)


@fault(f"{V}/pull/36580")
def slots_of_a_chunk_from_the_start(patch: MonkeyPatch) -> None:
    def change(builder: batch.Builder, step: Step, to: dict[str, np.ndarray]) -> None:
        at, page = step.decoding, builder.limits.page_size
        for s, work in enumerate(step.work[step.decoding :], start=step.decoding):
            positions = np.arange(work.count)
            to["slots"][at : at + work.count] = to["tables"][s, positions // page] * page + positions % page
            at += work.count

    after_fill(patch, change)


@fault(f"{V}/issues/39734")
def request_larger_than_the_pool_waits_for_ever(patch: MonkeyPatch) -> None:
    patch.setattr(Scheduler, "refuse", lambda self, request: None)


@fault(f"{V}/pull/38624, {V}/pull/49620")
def token_of_a_preempted_request_twice(patch: MonkeyPatch) -> None:
    def preempt(original: Callable, self: Scheduler, sequence: Sequence) -> None:
        original(self, sequence)
        sequence.pending = 0
        self.preemptions -= 1  # so that it is taken up again within the same step

    around(patch, Scheduler, "_preempt", preempt)


@fault("github.com/sgl-project/sglang/pull/30895, 25852, " + f"{V}/pull/46428", "network")
def pad_rows_read_experts(patch: MonkeyPatch) -> None:
    around(patch, Network, "route", lambda original, self, name, x, pads: original(self, name, x, None))


@fault("github.com/mirage-project/mirage/pull/764", "network")
def router_of_16_rows(patch: MonkeyPatch) -> None:
    def of(original: Callable, library: str) -> Kernels:
        kernels = original(library)

        def router(logits: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = kernels.router(logits, **options)
            ids[16:] = 0
            return weights, ids

        return Kernels(**{**vars(kernels), "router": router})

    around(patch, Kernels, "of", of)


@fault(f"{V}/issues/52909", "network")
def chunk_sees_keys_aligned_to_its_start(patch: MonkeyPatch) -> None:
    def attend(original: Callable, self: Network, q: torch.Tensor, flat: Any, *cache: torch.Tensor) -> torch.Tensor:
        count = flat.query_start[1:] - flat.query_start[:-1]
        aligned = torch.where(torch.arange(len(count)) < flat.decoding, flat.context, count)
        kept = flat.context
        object.__setattr__(flat, "context", aligned)
        out = original(self, q, flat, *cache)
        object.__setattr__(flat, "context", kept)
        return out

    around(patch, Network, "attend", attend)


@fault(f"{NV}/pull/65, 66, 71, 151, 152: patches that misread `len % block == 1`")
def page_asked_for_one_token_late(patch: MonkeyPatch) -> None:
    def make_room(original: Callable, self: Scheduler, sequence: Sequence, chosen: dict) -> bool:
        sequence.computed -= 1
        try:
            return original(self, sequence, chosen)
        finally:
            sequence.computed += sequence.status is Status.RUNNING

    around(patch, Scheduler, "_make_room", make_room)
