"""A Hypothesis state machine over the engine: add, step, abort in any order, tiny pools, checked after every rule."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_harness.impls.qwen3_moe.scheduler import Refused
from moe_harness.impls.qwen3_moe.sequence import Request
from moe_harness.suites.model import fake

SIZES = (1, 2, 16)
STEPS = {"taken": 0}  # by all machines of this process


class EngineMachine(RuleBasedStateMachine):
    """Every token is compared with the hash of its history as it comes; at the end everything must have ended."""

    @initialize(
        page_size=st.sampled_from(SIZES), pages=st.integers(2, 9), sequences=st.integers(1, 6), extra=st.integers(0, 9),
        prefixes=st.booleans(),
    )  # fmt: skip
    def start(self, page_size: int, pages: int, sequences: int, extra: int, prefixes: bool) -> None:
        self.size, self.room = page_size, pages * page_size
        self.engine = fake.engine(
            pages=pages, page_size=page_size, sequences=sequences, tokens=sequences + extra * page_size,
            length=self.room + 1, prefixes=prefixes,
        )  # fmt: skip
        self.wanted: dict[int, list[int]] = {}
        self.got: dict[int, list[int]] = {}

    @rule(
        blocks=st.integers(0, 4), offset=st.integers(-1, 1), family=st.integers(0, 3), fork=st.integers(0, 70),
        new=st.integers(1, 12), stops=st.booleans(), temperature=st.sampled_from((0.0, 0.5)),
    )  # fmt: skip
    def add(self, blocks: int, offset: int, family: int, fork: int, new: int, stops: bool, temperature: float) -> None:
        """A prompt of n pages, one token more or less, that shares its start with others of its family."""
        length = blocks * self.size + offset
        period = self.size if family == 2 else fake.VOCABULARY  # every page of family 2 holds the same tokens
        start = self.size * 7 if family == 3 else family  # family 3 starts as the second page of family 0 does
        prompt = tuple((start + p % period * 7 + (p >= fork) * 11) % fake.VOCABULARY for p in range(length))
        stop = frozenset(range(0, fake.VOCABULARY, 3)) if stops else frozenset()
        request = Request(prompt, new, temperature, top_k=3 if stops else None, seed=fork, stop_ids=stop)
        fits = length >= 1 and length + new - 1 <= self.room and length + new <= self.room + 1
        try:
            number = self.engine.add(request)
        except Refused:
            assert not fits, f"{length} + {new} tokens were refused in {self.room}"
            return
        assert fits, f"{length} + {new} tokens were taken in {self.room}"
        self.wanted[number], self.got[number] = fake.continuation(prompt, new, stop), []

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @precondition(lambda self: getattr(self, "engine", None) and self.engine.sequences)
    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        alive = sorted(self.engine.sequences)
        number = alive[which % len(alive)]
        assert self.engine.abort(number) == self.got[number]
        del self.wanted[number]

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        limit = 4 * sum(len(tokens) + 2 for tokens in self.wanted.values()) + 40 * len(self.wanted) + 4
        while self.engine.busy:
            self._step()
            self.engine.check()
            limit -= 1
            assert limit, "the engine goes on without an end"
        for number, tokens in self.wanted.items():
            assert self.got[number] == tokens, f"request {number} gave {self.got[number]}, wanted {tokens}"
        pages = self.engine.scheduler.pages
        assert len(pages.free) == pages.total, f"{pages.total - len(pages.free)} pages are held by nobody"

    def _step(self) -> None:
        STEPS["taken"] += 1
        for output in self.engine.step():
            got, wanted = self.got[output.number], self.wanted[output.number]
            got.append(output.token)
            assert got == wanted[: len(got)], f"request {output.number} gave {got}, wanted {wanted}"
            assert output.finished == (len(got) == len(wanted)), f"request {output.number} ended at {len(got)}"
