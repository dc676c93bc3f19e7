"""One rank: a process that keeps its process group and runs one task after another for the controller."""

import errno
import importlib
import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_harness.harness.core import blame
from moe_harness.harness.core.contracts import REJECTIONS
from moe_harness.harness.core.environment import what_is_missing
from moe_harness.harness.core.errors import HarnessError
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.harness.process.start import make_folder
from moe_harness.harness.ranks import comm
from moe_harness.harness.ranks.heartbeat import State
from moe_harness.harness.ranks.inject import InjectedError, Injector
from moe_harness.harness.ranks.jobs import Home, Job, Reply

# The controller judges long before this; it only ends workers whose controller was killed.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LOG_LIMIT = 1 << 20  # bytes that a worker may have printed before its log starts anew with the next job


def serve(connection: Any, rank: int, home: Home) -> None:
    """Join the group of `home` as `rank`, say "ready", then run the jobs that come until there are no more."""
    torch.set_num_threads(1)
    log = Log(home.log(rank))
    device = _gpu(rank, home) if home.backend == "nccl" else None
    recorder = comm.Recorder(rank, home.heartbeat(), home.journal(rank))
    store = _store(rank, home)
    dist.init_process_group(
        home.backend,
        store=store,
        rank=rank,
        world_size=home.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device,  # NCCL connects now, so that what it lacks is not taken for a fault of the first case
    )
    world: Any = dist.group.WORLD
    me = Rank(rank, home.world_size, home.backend, recorder, world, home.folder or make_folder())
    comm.install(recorder)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the controller is gone; a clean shutdown would wait for peers
        log.renew()
        connection.send(run_job(me, recorder, job))


def _gpu(rank: int, home: Home) -> torch.device:
    """The GPU of this rank, made current; NCCL needs one for each rank of a machine."""
    count = torch.cuda.device_count()
    if count == 0 or (home.world_size > count and not home.address):
        raise RuntimeError(f"{home.world_size} ranks over nccl need {home.world_size} GPUs, but there are {count}")
    torch.cuda.set_device(rank % count)
    return torch.device("cuda", rank % count)


def _store(rank: int, home: Home) -> dist.Store:
    """Where the ranks find each other: a fresh file on one machine, rank 0's port across machines."""
    if not home.address:
        return dist.FileStore(str(home.store()), home.world_size)
    host, _, port = home.address.rpartition(":")
    return dist.TCPStore(host, int(port), home.world_size, is_master=rank == 0, timeout=COLLECTIVE_TIMEOUT)


class Log:
    """The file that takes what the worker prints: when one rank fails, the libraries of all others write about it."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(self.file, number)
        self._streams()

    def renew(self) -> None:
        """Begin the file anew where it has become long, and the streams where an implementation has closed them."""
        if os.fstat(self.file).st_size > LOG_LIMIT:
            os.ftruncate(self.file, 0)
        if sys.stdout.closed or sys.stderr.closed:
            self._streams()

    def _streams(self) -> None:
        """Whoever closes these must not close numbers 1 and 2, which the next file would get."""
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def run_job(me: Rank, recorder: comm.Recorder, job: Job) -> Reply:
    """Run one job; every exception becomes a reply, those that ask a process to end as well."""
    task = find(job.task)
    mine = job.injection is not None and job.injection.rank == me.rank
    try:
        recorder.start(job.number, Injector(job.injection if mine else None))
        enter = (lambda *given: task(*given)) if task.__module__.startswith(JUDGE) else partial(blame.hand_over, task)
        reply = Reply(result=enter(me, job.spec, job.seed), calls=recorder.calls)
        if dist.group.WORLD is not me.group:
            raise GroupDestroyed(GONE)
    except BaseException as error:
        message = what_is_missing(error) or f"{type(error).__name__}: {error}{_no_refusal(error)}"
        if dist.group.WORLD is not me.group and not isinstance(error, GroupDestroyed):
            message = f"{GONE}; then it raised {message}"
        reply = Reply(None, message, traceback.format_exc(), recorder.failed, recorder.calls, _whose(error))
    recorder.say(State.DONE)
    return reply


JUDGE = "moe_harness.harness."


GONE = "the process group that it was given was destroyed or replaced, but belongs to the caller"


class GroupDestroyed(Exception):
    """An implementation did away with the caller's process group."""


def _no_refusal(error: BaseException) -> str:
    """Why an exception of a kind that refuses an input is none here."""
    if not isinstance(error, REJECTIONS) or blame.is_judges(error) or blame.own_refusal(error):
        return ""
    return f"\n  by no `raise` of its own, and so no refusal, at {blame.place(error)}"


def _whose(error: BaseException) -> str:
    """Whose an exception is, where it is not the implementation's."""
    if isinstance(error, HarnessError | GroupDestroyed | InjectedError):  # the first tell by themselves what they are
        return ""
    if isinstance(error, OSError) and error.errno == errno.EBADF:  # it closed what belongs to others
        return ""
    if blame.machine_trouble(error):
        return "machine"
    if what_is_missing(error) is not None:
        return "missing"
    return "judge" if blame.is_judges(error) else ""


def find(task: str) -> Any:
    """The callable that "package.module:attribute" names."""
    module, _, attribute = task.partition(":")
    return getattr(importlib.import_module(module), attribute)
