"""The symmetric dispatcher without GPUs: its kernels interpreted over shared memory, and its refusal."""

import pytest

pytest.importorskip("triton")

from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.subjects import format_findings

FILE = "suites/dispatcher/interpreted.py"
MOST_TOKENS = 17  # the bound of `Bounded`, which a rank that holds more cannot tell the others
_Prepared = load("dispatcher", "moe_harness.impls.launching:Prepared")


@pytest.mark.parametrize(("name", "first"), [("Symmetric", 0), ("Bounded", 10)])
@pytest.mark.parametrize("world", [2, 3])
def test_interpreted_equals_the_dense_layer(name: str, first: int, world: int) -> None:
    """Also where some ranks hold more tokens than are written directly: all ranks fall back then.

    A case takes seconds in the interpreter; each of the two gets others.
    """
    planned = [planned for planned in cases.plan([world]) if max(planned.case.tokens) <= MOST_TOKENS]
    for each in planned[first::20]:
        verdict = judge.judge(f"{FILE}:{name}", each.id)
        assert verdict.passed, f"{format_findings(verdict)} {verdict.unsupported}"


def test_refused_on_every_rank_without_gpus() -> None:
    verdict = judge.judge("dispatchers:symmetric", "dispatcher/dense/R=2,E=4,k=2,T=2+2")
    assert not verdict.findings
    assert "gloo" in str(verdict.unsupported)


class _Kernel:
    """What Triton's kernels look like from outside: the first start compiles, the compiled one is started directly."""

    arg_names = ("rows", "tokens", "peers", "width", "RANK", "RANKS")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.direct: list[tuple[object, ...]] = []

    def __getitem__(self, grid: object):
        def first(*arguments: object, **constants: object) -> "_Kernel":
            self.compiled.append((*arguments, *constants.values()))
            return self

        return first

    def run(self, *arguments: object) -> None:
        assert arguments[:9] == (4, 1, 1, "stream", "function", "metadata", None, None, None)
        self.direct.append(arguments[9:])


def test_a_prepared_kernel_gets_the_same_arguments_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_harness.impls.launching._current_device", lambda: 0)
    monkeypatch.setattr("moe_harness.impls.launching._current_stream", lambda device: "stream")
    kernel = _Kernel()
    start = _Prepared(kernel, 4, ("peers", 7), {"RANK": 0, "RANKS": 2})
    for rows in ("a", "b", "c"):
        start(rows, 1)
    assert kernel.compiled == [("a", 1, "peers", 7, 0, 2)]
    assert kernel.direct == [("b", 1, "peers", 7, 0, 2), ("c", 1, "peers", 7, 0, 2)]
