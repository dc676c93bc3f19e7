"""Calls that repeat recorded launches: the same bits as the first way, whatever changes between the calls.

Without a GPU the compiled kernels are played: what a launcher gets are addresses, from which the tensors are made again
and handed to Triton's interpreter.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.impls import launching
from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton import (
    experts,
    grouped_linear,
    paged_attention,
    projection,
    rms_norm,
    rope_cache,
    router,
    shared_expert_gate,
)
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable

INTERPRETER = threading.Lock()  # it knows one kernel at a time
SIZES = {"T": 5, "H": 40, "I": 24, "E": 5, "k": 2}


class Played:
    """A compiled kernel whose launcher gets addresses and runs the interpreter."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: list[Any]):
        self.kernel, self.grid, self.starts = kernel, grid, 0
        self.like = [(a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else None for a in arguments]

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert (x, y, z) == (*self.grid, 1, 1)[:3] and stream == 11
        assert rest[:5] == (self.function, self.packed_metadata, None, None, None)
        given = [self._tensor(like, a) if like else a for like, a in zip(self.like, rest[5:], strict=True)]
        with INTERPRETER:
            self.starts += 1
            self.kernel[self.grid](**dict(zip(self.kernel.arg_names, given, strict=True)))

    def _tensor(self, like: tuple[torch.dtype, torch.Size, tuple[int, ...]], address: object) -> Tensor:
        assert type(address) is int
        dtype, shape, strides = like
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        memory = (ctypes.c_char * (reach * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Played]]:
    """Every kernel recorded in a test; what other tests of this process recorded is forgotten."""
    seen: list[Played] = []
    for repeated in REPEATED.values():
        repeated.plans.clear()
    if not CUDA:
        keep = launching._Recording.keep

        def played(self: Any, kernel: Any, _: object, grid: Any, arguments: Any, constants: Any) -> None:
            seen.append(Played(kernel, grid, launching.ordered(kernel, arguments, constants)))
            keep(self, kernel, seen[-1], grid, arguments, constants)

        monkeypatch.setattr(launching._Recording, "keep", played)
        monkeypatch.setattr(launching, "COMPILED", ("cpu",))
        monkeypatch.setattr(launching, "_current_device", lambda: None)  # the index of "cpu"
        monkeypatch.setattr(launching, "_current_stream", lambda device: 11)
    yield seen
    for repeated in REPEATED.values():
        repeated.plans.clear()


REPEATED: dict[str, Repeated] = {
    "experts": experts._experts,
    "few experts": experts._experts,
    "grouped_linear": grouped_linear._grouped_linear,
    "router": router._route,
    "projection": projection.run,
    "norm": rms_norm._normed,
    "rotation": rope_cache._turn,
    "attention": paged_attention._attend,
    "shared_expert_gate": shared_expert_gate._gated_rows,
}


def draw(name: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor | None, ...]:
    """The tensors of one call."""
    generator = torch.Generator().manual_seed(seed)
    t, h, i, e, k = SIZES.values()
    t = 2 if name in ("few experts", "rotation", "attention") else t

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    if "experts" in name:
        ids = torch.rand(t, e, generator=generator).topk(k).indices.to(DEVICE)
        ids[0, 0] = -1
        return normal(t, h), normal(e, 2 * i, h), normal(e, h, i), normal(t, k), ids, None
    if name == "grouped_linear":
        sizes = torch.multinomial(torch.ones(e), t, replacement=True, generator=generator).bincount(minlength=e)
        return normal(t, h), normal(e, i, h), sizes.to(DEVICE), normal(e, i)
    if name == "router":
        return normal(t, e), normal(e), None
    if name == "norm":
        return normal(2, t, h), normal(h), normal(t, h)
    if name in ("rotation", "attention"):
        q, keys, values, order = normal(t, 4, 16), normal(t, 8, 2, 16), normal(t, 8, 2, 16), torch.arange(t + 1)
        order = order.to(DEVICE)
        if name == "attention":
            return q, keys, values, torch.stack((order[:-1], order[:-1].flip(0)), 1), order, order[:-1] % 16 + 1
        return (
            q,
            normal(t, 2, 16),
            normal(t, 2, 16),
            order[1:] * 1,
            order[:-1] * 1,
            keys,
            values,
            normal(16),
            normal(16),
        )
    return {
        "projection": (normal(t, h), normal(e, h)),
        "shared_expert_gate": (normal(t, h), normal(1, h), normal(t, i)),
    }[name]


OPTIONS: dict[str, tuple[Any, ...]] = {
    "experts": ("silu",),
    "few experts": ("gelu_tanh",),
    "router": (2, "sigmoid", True, None, None, 1.5, None),
    "projection": (projection.Plan(16, 16, 32, 1, 4, 1, False),),
    "norm": (1e-6,),
    "rotation": (1e-6, 1e4, None, False),
    "attention": (0.25, False),
}


def run(name: str, tensors: tuple[Tensor | None, ...], repeated: bool = True) -> tuple[Tensor, ...]:
    function: Callable[..., Any] = REPEATED[name] if repeated else REPEATED[name].function
    options = OPTIONS.get(name, ())
    result = function(tensors, *options) if repeated else function(*tensors, *options)
    return result if isinstance(result, tuple) else (result,)


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def strided(tensor: Tensor | None) -> Tensor | None:
    """The same values with gaps between the rows, at an address as aligned as before."""
    if tensor is None:
        return None
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 8)
    wide[..., :-8] = tensor
    return wide[..., :-8]


def moved(tensor: Tensor | None) -> Tensor | None:
    """The same values without gaps, one element off any alignment."""
    return None if tensor is None else tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls_give_the_bits_of_the_function(name: str, compiled: list[Played]) -> None:
    first = run(name, draw(name, 0))
    for seed in range(1, 4):
        tensors = draw(name, seed)
        assert equal(run(name, tensors), run(name, tensors, repeated=False))
    assert len(REPEATED[name].plans) == 1
    assert equal(first, run(name, draw(name, 0), repeated=False)), "a later call changed an earlier result"
    if not CUDA:
        assert {kernel.starts for kernel in compiled} == {3}, "a call did not repeat every launch once"


@pytest.mark.parametrize("name", REPEATED)
def test_other_strides_alignments_and_dtypes_are_another_signature(name: str) -> None:
    kinds = [draw(name, 1), draw(name, 2, torch.float32)]
    kinds += [tuple(map(change, draw(name, 3))) for change in (strided, moved)]
    for tensors in kinds * 2:
        assert equal(run(name, tensors), run(name, tensors, repeated=False))
    assert len(REPEATED[name].plans) == len(kinds)


def test_tensors_that_start_at_one_address_are_another_signature() -> None:
    """Recorded with one tensor for two operands, a plan would give both the memory of the first."""
    (x, weight, _), (y, _, _) = draw("shared_expert_gate", 1), draw("shared_expert_gate", 2)
    for tensors in ((x, weight, x), (x, weight, y), (y, weight, y)):
        assert equal(run("shared_expert_gate", tensors), run("shared_expert_gate", tensors, repeated=False))


def test_a_plan_holds_no_memory(compiled: list[Played]) -> None:
    run("experts", draw("experts", 0))
    (plan,) = REPEATED["experts"].plans.values()
    assert not any(isinstance(value, Tensor) for value in plan.values)
    assert plan.size > 0 and all(offset % launching.ALIGNMENT == 0 for offset in plan.offsets)


def test_threads_share_plans_and_nothing_else() -> None:
    batches = [draw("router", seed) for seed in range(8)]
    wanted = [run("router", batch, repeated=False) for batch in batches]
    found: dict[int, bool] = {}
    run("router", draw("router", 0))

    def work(number: int) -> None:
        found[number] = all(equal(run("router", batches[number]), wanted[number]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)
    assert len(REPEATED["router"].plans) == 1


def test_old_plans_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KEPT", 2)
    for tokens in (1, 2, 3, 1):
        logits, *rest = draw("router", tokens)
        tensors = (logits[:tokens], *rest)
        assert equal(run("router", tensors), run("router", tensors, repeated=False))
    shapes = [key[1] for key in REPEATED["router"].plans]
    assert shapes == [(3, SIZES["E"]), (1, SIZES["E"])]


def test_no_tokens_are_repeated_as_nothing() -> None:
    (x, *rest) = draw("experts", 0)
    none = (x[:0], rest[0], rest[1], rest[2][:0], rest[3][:0], None)
    assert [run("experts", none)[0].shape for _ in range(2)] == [(0, SIZES["H"])] * 2
    logits, *options = draw("router", 0)
    assert [run("router", (logits[:0], *options))[1].shape for _ in range(2)] == [(0, 2)] * 2


def test_a_call_that_raises_leaves_nothing() -> None:
    x, up, down, *rest = draw("experts", 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"should be \[T, H\]"):
            run("experts", (x[:, 1:], up, down, *rest))
    assert not REPEATED["experts"].plans
    assert launching._recording.get() is None


def test_memory_of_unknown_origin_is_told() -> None:
    """A function that works on memory of its own cannot be repeated."""

    @Repeated
    def wrong(logits: Tensor) -> Tensor:
        out = empty(logits, 1)
        launch(_Nothing(), (1,), torch.ones(3, device=logits.device), out)
        return out

    with pytest.raises(RuntimeError, match="nothing was given memory that is neither an input nor made"):
        wrong((torch.ones(2, device=DEVICE),))


class _Nothing:
    arg_names, __name__ = ("a", "b"), "nothing"
    run = function = packed_metadata = None

    def __getitem__(self, grid: object) -> Callable[..., object]:
        return lambda *arguments, **constants: self


@pytest.mark.skipif(not CUDA, reason="streams and graphs are a GPU's")
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_on_streams_and_in_graphs(name: str) -> None:
    tensors, others = draw(name, 1), draw(name, 2)
    run(name, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(name, tensors)
    torch.cuda.current_stream().wait_stream(side)
    assert equal(on_side, run(name, tensors, repeated=False))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(name, tensors)
    for into, values in zip(tensors, others, strict=True):
        if into is not None and values is not None:
            into.copy_(values)
    graph.replay()
    assert equal(result, run(name, others, repeated=False))
