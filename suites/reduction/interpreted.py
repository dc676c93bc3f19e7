"""The sum over ranks through symmetric memory on the CPU: its kernel interpreted, all ranks' memory one shared file.

`changed` plants faults in the kernel's text.  A `Script` says at which of its atomic operations a rank waits for
another one, so that what depends on who is faster is the same in every run, on any machine.
"""

import functools
import importlib.util
import linecache
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined; workers that import this run nothing else

import pytest
import torch
import torch.distributed as dist
import triton.runtime.interpreter as interpreter
from torch import Tensor

from moe_harness.impls.dispatchers import _put
from moe_harness.impls.dispatchers.symmetric import Workspace
from moe_harness.impls.parallel import _sum_norm, symmetric
from moe_harness.impls.parallel import reduction as parallel

POLL = 0.0005  # seconds
Change = tuple[str, str]  # a part of the kernel's text, and what stands there instead


class SumNorm(symmetric.SumNorm):
    """Its memory is a file that all ranks have mapped.  `words`: whether parts are put in words, as small ones are."""

    def __init__(self, group: dist.ProcessGroup, kernels: Any = _sum_norm, programs: int = 3, words: bool = True):
        super().__init__(group, torch.device("cpu"), largest=1 << 14, in_words=(1 << 14) * words)
        self.kernels = _Programs(kernels, programs)

    def _require(self, group: dist.ProcessGroup) -> None:
        """Nothing is missing here."""

    def _mapped(self, size: int) -> Workspace:
        whole, own = shared_file(self.group, size), self.rank
        peers = torch.tensor([whole[q].data_ptr() for q in range(self.ranks)])
        return Workspace(whole[own], peers, torch.zeros(self.kernels.PROGRAMS, dtype=torch.int64), whole)


class _Programs:
    """The kernels, with fewer programs: the interpreter runs one after the other."""

    def __init__(self, kernels: Any, programs: int):
        self.sum_norm, self.sum_norm_in_words, self.PROGRAMS = kernels.sum_norm, kernels.sum_norm_in_words, programs


def shared_file(group: dist.ProcessGroup, size: int) -> Tensor:
    """uint8 [R, size], the same memory on every rank."""
    path, ranks = [f"{tempfile.mkdtemp()}/memory"], dist.get_world_size(group)
    dist.broadcast_object_list(path, src=dist.get_global_rank(group, 0), group=group)
    if dist.get_rank(group) == 0:
        Path(path[0]).write_bytes(bytes(size * ranks))
    dist.barrier(group)
    whole = torch.UntypedStorage.from_file(path[0], True, size * ranks)
    dist.barrier(group)
    if dist.get_rank(group) == 0:
        Path(path[0]).unlink()
        Path(path[0]).parent.rmdir()
    return torch.empty(0, dtype=torch.uint8).set_(whole).view(ranks, size)


def changed(changes: Sequence[Change]) -> ModuleType:
    """The kernel's module, and that of its flags, with parts of their text changed, each of which stands in one."""
    with tempfile.TemporaryDirectory() as folder:
        put = _module(_put, Path(folder, "put.py"), changes)
        found = _module(_sum_norm, Path(folder, "sum_norm.py"), changes)
        found._raise_flags, found._wait_for = put._raise_flags, put._wait_for
        return found


def _module(like: ModuleType, file: Path, changes: Sequence[Change]) -> ModuleType:
    text = Path(str(like.__file__)).read_text()
    for old, new in changes:
        text = text.replace(old, new)
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"changed_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = text.splitlines(keepends=True)  # the interpreter reads them when the kernel first runs
    linecache.cache[str(file)] = (len(text), None, lines, str(file))
    return module


def planted(changes: Sequence[Change]) -> bool:
    """Whether each change finds its text: once in a kernel or in both, or where they have none of it in their flags."""
    flags, kernel = (Path(str(module.__file__)).read_text() for module in (_put, _sum_norm))
    return all(kernel.count(old) in (1, 2) or (not kernel.count(old) and flags.count(old) == 1) for old, _ in changes)


CALLS, RETURNED = 16, 1 << 40
Until = Callable[[Tensor], bool]  # of how many atomic operations each rank has made in each call, int64 [R, CALLS]


class Script:
    """Where this rank waits: before a call and after some of its atomic operations, until something holds.

    Args:
        before: by the number of the call.
        after: by the number of the call and the number of the operation in it, from 1.
    """

    def __init__(self, group: dist.ProcessGroup, before: dict[int, Until], after: dict[tuple[int, int], Until]):
        self.counts = shared_file(group, 8 * CALLS).view(torch.int64)
        self.rank, self.before, self.after, self.call = dist.get_rank(group), before, after, -1

    def __enter__(self) -> "Script":
        self.original = interpreter.interpreter_builder.create_atomic_rmw
        interpreter.interpreter_builder.create_atomic_rmw = self._counted
        return self

    def __exit__(self, *error: object) -> None:
        del interpreter.interpreter_builder.create_atomic_rmw

    @contextmanager
    def calling(self) -> Iterator[None]:
        """The next call."""
        self.call += 1
        self._wait(self.before.get(self.call))
        yield
        self.counts[self.rank, self.call] += RETURNED

    def _counted(self, *given: Any) -> Any:
        result = self.original(*given)
        self.counts[self.rank, self.call] += 1
        self._wait(self.after.get((self.call, int(self.counts[self.rank, self.call]))))
        return result

    def _wait(self, until: Until | None) -> None:
        while until is not None and not until(self.counts):
            time.sleep(POLL)


def reduction(routed: Tensor, shared: Tensor | None, group: Any, **states: Any) -> Tensor:
    """`parallel:symmetric` with the interpreted kernel, for the stage `reduction`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_through", _through)
        return parallel.symmetric(routed, shared, group, **states)


@functools.cache
def _through(group: Any, device: Any) -> SumNorm:
    return SumNorm(group)
