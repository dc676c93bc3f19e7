"""The recording communicator: every collective of this process, with operation, shapes, splits and bytes.

`install` replaces the functions of torch.distributed once per worker process, before any implementation is loaded,
so that a stranger's dispatcher is recorded unmodified.  Calls inside calls (object collectives, deprecated names) are
recorded once, at the level that moves tensors.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from moe_harness.harness.ranks.calls import Call
from moe_harness.harness.ranks.describe import OPERATIONS, Movement, Place
from moe_harness.harness.ranks.heartbeat import Heartbeat, State
from moe_harness.harness.ranks.inject import Injector

_LIBRARY = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(__file__)


class Recorder:
    """What one rank called since `start`, and its voice in the shared heartbeat."""

    def __init__(self, rank: int, heartbeat: Heartbeat, journal: Path):
        self.rank, self.heartbeat = rank, heartbeat
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.texts: list[bytes] = []  # each call as JSON
        self.calls: list[Call] = []
        self.inside = False
        self.started: dict[int, Call] = {}  # operations that nobody has waited for yet
        self.job = 0
        self.failed: Call | None = None  # the call out of which an exception came
        self.injector = Injector()

    def start(self, job: int, injector: Injector) -> None:
        """Forget the last job's calls; `injector` goes around those of this one."""
        self.job = job
        self.calls, self.injector, self.inside, self.failed = [], injector, False, None
        self.texts, self.started = [], {}
        os.ftruncate(self.journal, 0)
        self.say(State.RUNNING)

    def say(self, state: State, call: Call | None = None) -> None:
        self.heartbeat.write(self.rank, state, b"" if call is None else self.texts[call.index], self.job)

    def record(self, op: str, given: dict[str, Any], moved: Movement, place: Place) -> Call:
        tensor = next(iter([*moved.inputs, *moved.outputs]), None)
        width = tensor.element_size() if tensor is not None else 0
        call = Call(
            index=len(self.calls),
            op=op,
            group=place.members,
            dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
            inputs=tuple(tuple(t.shape) for t in moved.inputs),
            outputs=tuple(tuple(t.shape) for t in moved.outputs),
            sends=tuple(moved.sends),
            receives=tuple(moved.receives),
            root=moved.root,
            reduce=_reduction(given.get("op")),
            sent=moved.sent * width,
            received=moved.received * width,
            site=call_site(),
        )
        self.calls.append(call)
        self.texts.append(json.dumps(call.as_dict(), separators=(",", ":")).encode())
        os.write(self.journal, self.texts[-1] + b"\n")
        return call


def _reduction(op: Any) -> str:
    return "" if op is None else str(op).rpartition(".")[2]


def call_site() -> str:
    """file:line and function of the nearest frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_LIBRARY, "<")) and os.path.dirname(path) != _OWN:
            return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class RecordedWork:
    """A pending operation whose `wait` is visible in the heartbeat."""

    def __init__(self, work: Any, recorder: Recorder, call: Call):
        self._work, self._recorder, self._call = work, recorder, call
        recorder.started[call.index] = call

    def wait(self, *args: Any, **keywords: Any) -> Any:
        self._recorder.started.pop(self._call.index, None)
        self._recorder.say(State.WAITING, self._call)
        try:
            result = self._work.wait(*args, **keywords)
        except BaseException:
            self._recorder.failed = self._call
            raise
        self._recorder.say(State.RUNNING, self._call)
        return result

    def __getattr__(self, name: str) -> Any:
        """All else is the work's own; whoever asks it whether it is done, or for its future, takes care of it."""
        self._recorder.started.pop(self._call.index, None)
        return getattr(self._work, name)


def place_of(group: Any) -> Place | None:
    """Members and position of this rank in `group` (None: the world); None where this rank is not a member."""
    group = dist.group.WORLD if group is None else group
    if group is None or group is dist.GroupMember.NON_GROUP_MEMBER:
        return None
    members = tuple(dist.get_process_group_ranks(group))
    return Place(members, members.index(dist.get_rank()))


def recorded(name: str, original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """`original` of torch.distributed with a record before it and the injected fault, if any, around it."""
    op, describe = OPERATIONS[name]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **keywords: Any) -> Any:
        if recorder.inside:
            return original(*args, **keywords)
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        place = place_of(bound.arguments.get("group"))
        if place is None:
            return original(*args, **keywords)

        def execute() -> Any:
            moved = describe(bound.arguments, place)
            entry = recorder.record(op, bound.arguments, moved, place)
            waits = not bound.arguments.get("async_op") and op not in ("isend", "irecv")
            tensor = next(iter([*moved.inputs, *moved.outputs]), None)
            device = None if tensor is None else tensor.device
            return _run(recorder, entry, waits, lambda: original(*bound.args, **bound.kwargs), device)

        return recorder.injector.around(len(recorder.calls), name, bound.arguments, execute)

    return call


def _finish(device: torch.device | None) -> None:
    """On a GPU a collective returns before it is done; waiting here makes a stuck one visible as such."""
    if device is not None and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def _run(recorder: Recorder, entry: Call, waits: bool, original: Callable[[], Any], device: torch.device | None) -> Any:
    recorder.inside = True
    if waits:
        recorder.say(State.WAITING, entry)
    try:
        result = original()
        if waits:
            _finish(device)
    except BaseException:
        recorder.failed = entry
        raise
    finally:
        recorder.inside = False
    recorder.say(State.RUNNING, entry)
    if waits:
        return result
    return None if result is None else RecordedWork(result, recorder, entry)


def install(recorder: Recorder) -> None:
    """Replace the collectives of torch.distributed in this process, for good.  Object collectives stay as they are:
    the tensor operations inside them are what is recorded."""
    for name in OPERATIONS:
        original = getattr(c10d, name, None)
        if original is None:  # a name that this version of torch lacks
            continue
        wrapper = recorded(name, original, recorder)
        setattr(c10d, name, wrapper)
        setattr(dist, name, wrapper)
