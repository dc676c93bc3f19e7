"""The engine over a fake device: any mix-up of pages, tables, chunks or tokens changes what is generated."""

import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from moe_harness.impls.qwen3_moe.engine import Engine
from moe_harness.impls.qwen3_moe.pages import Pages
from moe_harness.impls.qwen3_moe.runner import buckets
from moe_harness.impls.qwen3_moe.scheduler import BESIDE, Refused, Scheduler
from moe_harness.impls.qwen3_moe.sequence import Request, Sequence
from moe_harness.suites.drawing import examples
from moe_harness.suites.model import fake, machine

EXAMPLES = examples(150)


def test_any_history_of_requests_gives_the_right_tokens() -> None:
    """The state machine; also that it is a real one: 2,000 steps, and fast enough to be run on every change."""
    before, start = machine.STEPS["taken"], time.process_time()
    run_state_machine_as_test(machine.EngineMachine, settings=settings(max_examples=EXAMPLES, stateful_step_count=30))
    steps, seconds = machine.STEPS["taken"] - before, time.process_time() - start
    assert steps >= 2000, f"only {steps} steps were taken"
    assert seconds * 2000 / steps < 20, f"{steps} steps took {seconds:.0f} s"


def prompts(size: int) -> list[tuple[int, ...]]:
    """One page more or less than n pages, twice each, with a common start."""
    lengths = sorted({max(1, n * size + offset) for n in (1, 2, 3) for offset in (-1, 0, 1)})
    return [tuple((p * 5 + 1) % fake.VOCABULARY for p in range(length)) for length in lengths for _ in range(2)]


@pytest.mark.parametrize("page_size", machine.SIZES)
def test_tokens_do_not_depend_on_pool_chunk_or_company(page_size: int) -> None:
    """Preempted = undisturbed, chunked = one shot, prefix hit = miss, alone = together."""
    asked = [Request(prompt, 9) for prompt in prompts(page_size)]
    wanted = [fake.continuation(request.prompt, 9) for request in asked]
    length = 3 * page_size + 1 + 9
    least = -(-length // page_size)
    counts = set()
    for pages in (least, least + 2, 400):
        for tokens in (4, 5, 7, 400):
            for prefixes in (False, True):
                engine = fake.engine(
                    pages=pages, page_size=page_size, sequences=4, tokens=tokens, length=length, prefixes=prefixes
                )
                assert engine.generate(asked) == wanted
                engine.check()
                counts.add((engine.scheduler.preemptions > 0, engine.scheduler.found_tokens > 0))
    assert {preempted for preempted, _ in counts} == {found for _, found in counts} == {False, True}


def test_a_request_that_never_fits_is_refused_and_the_others_go_on() -> None:
    engine = fake.engine(pages=4, page_size=2, length=100)
    first = engine.add(Request((1, 2, 3), 4))
    with pytest.raises(Refused, match="3 prompt tokens and 7 new ones fill 5 pages of 2 tokens.*the 4 there are"):
        engine.add(Request((1, 2, 3), 7))
    with pytest.raises(Refused, match="wanted at most 100"):
        engine.add(Request((1,) * 99, 2))
    with pytest.raises(Refused, match="empty"):
        engine.add(Request((), 2))
    with pytest.raises(Refused, match="request 1: max_new_tokens is 0"):
        engine.generate([Request((1,), 2), Request((1,), 0)])
    assert list(engine.sequences) == [first]
    tokens = [output.token for _ in range(6) for output in engine.step()]
    assert tokens == fake.continuation((1, 2, 3), 4)


def test_a_stream_gives_tokens_as_they_come_and_ends_with_its_listener() -> None:
    engine = fake.engine()
    other = engine.add(Request((9, 8), 5))
    wanted = fake.continuation((1, 2, 3), 6)
    stream = engine.stream(Request((1, 2, 3), 6))
    assert [next(stream) for _ in range(2)] == wanted[:2]
    assert engine.steps < 5, "the first tokens came late"
    stream.close()
    assert list(engine.sequences) == [other]
    assert list(engine.stream(Request((1, 2, 3), 6))) == wanted
    engine.check()


def test_an_interrupt_leaves_nothing_behind() -> None:
    engine = fake.engine()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request((1, 2), 2), Request((1, 2, 3), 9)], interrupt)
    engine.check()
    assert not engine.sequences
    assert engine.generate([Request((1, 2), 4)]) == [fake.continuation((1, 2), 4)]


@pytest.mark.parametrize(
    ("decoding", "rows"), [(1, BESIDE), (100, BESIDE), (BESIDE // 2, BESIDE), (BESIDE // 2 + 1, BESIDE + 1)]
)
def test_steps_with_prompts_beside_decoding_have_as_many_rows_each(decoding: int, rows: int) -> None:
    """However many decode, and half of them of prompts even where more than that do."""
    scheduler = Scheduler(
        Pages(decoding + 500, 16, False), max_sequences=decoding + 1, max_tokens=8192, max_length=9000
    )
    for number in range(decoding):
        scheduler.add(Sequence(number, Request((1,), 9)))
    assert scheduler.plan() is not None
    scheduler.add(Sequence(decoding, Request((1,) * 5000, 9)))
    for _ in range(2):
        step = scheduler.plan()
        assert step is not None and (step.decoding, step.tokens) == (decoding, rows)


@pytest.mark.parametrize("sequences", [*range(1, 40), 100, 200, 255, 256, 257, 300, 512, 1000])
def test_buckets_hold_every_batch(sequences: int) -> None:
    found = buckets(sequences)
    assert found == sorted(set(found))
    assert found[-1] == sequences
    assert len(found) <= 16 + max(0, sequences - 256 + 255) // 256


def broken(change: Callable[[Engine], None]) -> Engine:
    """An engine with two running sequences and known pages, then damaged."""
    engine = fake.engine(pages=12)
    for prompt in ((1, 2, 3, 4, 5), (1, 2, 3, 9)):
        engine.add(Request(prompt, 6))
    for _ in range(3):
        engine.step()
    engine.check()
    change(engine)
    return engine


def a_key(engine: Engine) -> tuple:
    return next(iter(engine.scheduler.pages.known))


DAMAGE: dict[str, Callable[[Engine], object]] = {
    "page lost": lambda e: e.scheduler.pages.free.popitem(),
    "page free and held": lambda e: e.scheduler.pages.free.update({e.scheduler.running[0].table[0]: None}),
    "page in two tables": lambda e: e.scheduler.running[0].table.append(e.scheduler.running[1].table[-1]),
    "page twice in a table": lambda e: e.scheduler.running[0].table.append(e.scheduler.running[0].table[0]),
    "page missing from a table": lambda e: e.scheduler.running[0].table.pop(),
    "count too large": lambda e: e.scheduler.pages.holders.__setitem__(e.scheduler.running[0].table[0], 5),
    "known page forgotten in one map": lambda e: e.scheduler.pages.known.pop(a_key(e)),
    "identity lost": lambda e: e.scheduler.pages.identity.popitem(),
    "identity twice": lambda e: e.scheduler.pages.identity.update(dict.fromkeys(e.scheduler.pages.identity, 1)),
    "row twice": lambda e: e.scheduler.rows.append(e.scheduler.running[0].row),
    "row lost": lambda e: e.scheduler.rows.pop(),
    "ran past its tokens": lambda e: setattr(e.scheduler.running[0], "computed", 99),
    "lost sequence": lambda e: e.sequences.popitem(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_integrity_check_sees_damage(damage: str) -> None:
    engine = broken(lambda e: DAMAGE[damage](e) and None)
    with pytest.raises(AssertionError):
        engine.check()
