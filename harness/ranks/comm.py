"""The recorder: every collective of this process, with operation, shapes, splits and bytes.

It sits in torch's own dispatch of the `c10d` operators, through which all goes that a process group does: the functions
of torch.distributed, `torch.distributed._functional_collectives`, DTensor and FSDP, compiled code, the methods of a
ProcessGroup, in any thread.  A stranger's dispatcher is recorded unmodified, at the level that moves tensors.

Not seen: what uses no process group's operators.  That is a Backend taken out of its group (`group._get_backend`),
stores, symmetric memory and other memory that ranks share, and libraries with communicators of their own (DeepEP,
NVSHMEM, MPI).  A rank inside such a call counts as running: nothing is proved about it, and only the budget ends it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C import DispatchKey
from torch.distributed import distributed_c10d as c10d

from moe_harness.harness.core.blame import pass_on
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.describe import OPERATORS, Given, Movement, Place
from moe_harness.harness.ranks.heartbeat import Heartbeat, State
from moe_harness.harness.ranks.inject import Injector

_LIBRARY = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(__file__)
RETELL = 0.1  # seconds between looks at whether threads that could still act have ended


class Recorder:
    """What one rank called since `start`, and its voice in the shared heartbeat."""

    def __init__(self, rank: int, heartbeat: Heartbeat, journal: Path):
        self.rank, self.heartbeat = rank, heartbeat
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.texts: list[bytes] = []  # each call as JSON
        self.calls: list[RecordedCall] = []
        self.started: dict[int, RecordedWork] = {}  # operations that nobody has waited for yet
        self.works: list[dist.Work] = []  # C++ holds on to the works, but not to what their `wait` does here
        self.job = 0
        self.failed: RecordedCall | None = None  # the call out of which an exception came
        self.injector = Injector()
        self.lock = threading.RLock()
        self.waiting_threads: dict[int, RecordedCall] = {}  # what each waits for
        self.open = threading.Event()  # set while one waits and another could still act
        threading.Thread(target=self._retell, name="retell", daemon=True).start()
        self.own_threads = threading.active_count()  # those of the harness
        self.library: Any = None  # what `install` holds on to

    def start(self, job: int, injector: Injector) -> None:
        """Forget the last job's calls; `injector` goes around those of this one."""
        self.job = job
        self.calls, self.injector, self.failed = [], injector, None
        self.works = list(self.started.values())  # somebody may still wait for these
        self.texts, self.started = [], {}
        os.ftruncate(self.journal, 0)
        self.say(State.RUNNING)

    def say(self, state: State, call: RecordedCall | None = None) -> None:
        text = b"" if call is None or call.index >= len(self.texts) else self.texts[call.index]
        self.heartbeat.write(self.rank, state, text, self.job)

    @contextmanager
    def waiting(self, call: RecordedCall) -> Iterator[None]:
        """Within, this thread waits for `call`; an exception that leaves it came out of that call."""
        with self.lock:
            self.waiting_threads[threading.get_ident()] = call
            self._tell_waiting(call)
        try:
            yield
        except BaseException:
            self.failed = call
            raise
        finally:
            with self.lock:
                self.waiting_threads.pop(threading.get_ident(), None)
                self.open.clear()
                self.say(State.RUNNING, call)

    def _tell_waiting(self, call: RecordedCall) -> None:
        """WAITING where no thread is left that could begin what others wait for, and none takes what anybody sends."""
        others = threading.active_count() - self.own_threads >= len(self.waiting_threads)
        if others or any(pending.op == "recv_any" for pending in self.waiting_threads.values()):
            self.say(State.OPEN, call)
            self.open.set()
        else:
            self.say(State.WAITING, call)
            self.open.clear()

    def _retell(self) -> None:
        """A thread of the harness: while one waits, the others may come to their end."""
        while True:
            self.open.wait()
            time.sleep(RETELL)
            with self.lock:
                if self.open.is_set() and self.waiting_threads:
                    alive = threading.active_count() - self.own_threads
                    if alive < len(self.waiting_threads):
                        self._tell_waiting(next(reversed(self.waiting_threads.values())))

    def record(self, op: str, given: Given, moved: Movement, place: Place) -> RecordedCall:
        tensor = _payload(moved)
        width = tensor.element_size() if tensor is not None else 0
        with self.lock:
            call = RecordedCall(
                index=len(self.calls),
                op=op,
                group=place.members,
                dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
                inputs=tuple(tuple(t.shape) for t in moved.inputs),
                outputs=tuple(tuple(t.shape) for t in moved.outputs),
                sends=tuple(moved.sends),
                receives=tuple(moved.receives),
                root=moved.root,
                reduce=_reduction(given.get("reduce_op")),
                sent=moved.sent * width,
                received=moved.received * width,
                site=call_site(),
            )
            self.calls.append(call)
            self.texts.append(json.dumps(call.as_dict(), separators=(",", ":")).encode())
            os.write(self.journal, self.texts[-1] + b"\n")
        return call


def _payload(moved: Movement) -> torch.Tensor | None:
    return next(iter([*moved.inputs, *moved.outputs]), None)


def _reduction(op: Any) -> str:
    return "" if op is None else dist.ReduceOp.RedOpType(op.op()).name


def call_site() -> str:
    """file:line and function of the nearest frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_LIBRARY, "<")) and os.path.dirname(path) != _OWN:
            return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class RecordedWork(dist.Work):
    """A pending operation whose `wait`, called from Python or from C++, is visible in the heartbeat."""

    def __init__(self, work: Any, recorder: Recorder, call: RecordedCall, device: torch.device | None):
        super().__init__()
        self._work, self._recorder, self._call, self._device = work, recorder, call, device

    def wait(self, *timeout: Any) -> bool:
        self.settle()
        with self._recorder.waiting(self._call):
            done = pass_on(self._work.wait, *timeout)
            _finish(self._device)
        return done

    def settle(self) -> None:
        """Whoever waits for it, asks whether it is done or takes its future takes care of it."""
        self._recorder.started.pop(self._call.index, None)


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: RecordedWork, *arguments: Any) -> Any:
        self.settle()
        return pass_on(getattr(self._work, name), *arguments)

    return method


for _name in dir(dist.Work):
    if not _name.startswith("__") and _name not in ("wait", "boxed", "unbox", "_pybind11_conduit_v1_"):
        setattr(RecordedWork, _name, _passed_on(_name))


class DeferredWork(dist.Work):
    """Stands for an operation that an injection puts off until after the next."""

    def wait(self, *timeout: Any) -> bool:
        return True


def place_of(group: dist.ProcessGroup) -> Place:
    """Members and position of this rank in `group`; of one that torch.distributed does not know, positions only."""
    ranks = c10d._world.pg_group_ranks.get(group)
    members = tuple(range(group.size())) if ranks is None else tuple(ranks)
    return Place(members, group.rank())


def _finish(device: torch.device | None) -> None:
    """On a GPU a collective returns before it is done; waiting here makes a stuck one visible as such."""
    if device is not None and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def recorded(name: str, recorder: Recorder) -> Callable[..., Any]:
    """The kernel for the operator c10d::`name`: a record before the original and, around it, the injected fault."""
    op, describe = OPERATORS[name]
    operator = getattr(torch.ops.c10d, name).default
    parameters = operator._schema.arguments
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    names = [p.name for p in parameters]

    def kernel(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        given |= {name: value for name, value in defaults.items() if name not in given}
        group = dist.ProcessGroup.unbox(given["process_group"])
        place = place_of(group)
        rest = keys.remove(DispatchKey.BackendSelect)

        def execute() -> Any:
            moved = describe(given, place)
            call = recorder.record(op, given, moved, place)
            payload = _payload(moved)
            device = None if payload is None else payload.device
            return _run(recorder, call, group, given, device, partial(pass_on, operator.redispatch, rest, **given))

        return recorder.injector.around(
            len(recorder.calls), given, execute, lambda: _put_off(operator, given, recorder)
        )

    return kernel


def _run(
    recorder: Recorder,
    call: RecordedCall,
    group: Any,
    given: Given,
    device: torch.device | None,
    original: Callable[[], Any],
) -> Any:
    """The original, its work replaced by one that tells of its `wait`."""
    waits = not given.get("async_op", call.op != "monitored_barrier")
    if waits:
        with recorder.waiting(call):
            result = original()
            _finish(device)
    else:
        try:
            result = original()
        except BaseException:
            recorder.failed = call
            raise
        recorder.say(State.RUNNING, call)
    return _with_work(result, lambda work: _watched(work, recorder, call, group, device, waits))


def _watched(work: Any, recorder: Recorder, call: RecordedCall, group: Any, device: Any, waits: bool) -> Any:
    pending = dist.Work.unbox(work)
    if pending is None:  # torch 2.11's NCCL, asked for nothing to wait for, returns a work that holds none
        return work
    watched = RecordedWork(pending, recorder, call, device)
    recorder.works.append(watched)
    if not waits and group not in c10d._world.pg_coalesce_state:  # there one work stands for several
        recorder.started[call.index] = watched
    return watched.boxed()


def _with_work(result: Any, replace: Callable[[Any], Any]) -> Any:
    """The result of an operator is its work, or a pair of its outputs and the work; some have none."""
    if isinstance(result, tuple):
        return (*result[:-1], None if result[-1] is None else replace(result[-1]))
    return None if result is None else replace(result)


def _put_off(operator: Any, given: Given, recorder: Recorder) -> Any:
    """What an operator returns whose execution comes later: its first argument, which holds the outputs, and a work."""
    work = DeferredWork()
    recorder.works.append(work)
    return work.boxed() if len(operator._schema.returns) == 1 else (next(iter(given.values())), work.boxed())


def install(recorder: Recorder) -> None:
    """Record the c10d operators of this process for as long as the recorder lives.

    The kernels stand under a key that every call meets, whatever its tensors are, and that torch leaves free for these
    operators; from there they go on to the original ones.
    """
    recorder.library = library = torch.library.Library("c10d", "IMPL")
    for name in OPERATORS:
        if hasattr(torch.ops.c10d, name):  # else this version of torch lacks it
            library.impl(name, recorded(name, recorder), "BackendSelect", with_keyset=True)
