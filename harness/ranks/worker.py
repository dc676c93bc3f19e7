"""One rank: a process that keeps its process group and runs one task after another for the controller."""

import importlib
import os
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_harness.harness.ranks import comm
from moe_harness.harness.ranks.heartbeat import State
from moe_harness.harness.ranks.inject import Injector
from moe_harness.harness.ranks.jobs import Home, Job, Reply

# The controller judges long before this; it only ends workers whose controller was killed.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Rank:
    """What a task is given: who it is and where its tensors live."""

    rank: int
    world_size: int
    backend: str
    recorder: comm.Recorder

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.group.WORLD  # type: ignore[return-value]


def serve(connection: Any, rank: int, home: Home) -> None:
    """Join the group of `home` as `rank`, say "ready", then run the jobs that come until there are no more."""
    torch.set_num_threads(1)
    _print_to(home.log(rank))
    device = _gpu(rank, home) if home.backend == "nccl" else None
    recorder = comm.Recorder(rank, home.heartbeat(), home.journal(rank))
    comm.install(recorder)
    store = _store(rank, home)
    dist.init_process_group(
        home.backend,
        store=store,
        rank=rank,
        world_size=home.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device,  # NCCL connects now, so that what it lacks is not taken for a fault of the first case
    )
    me = Rank(rank, home.world_size, home.backend, recorder)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the controller is gone; a clean shutdown would wait for peers
        connection.send(run_job(me, job))


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


def _print_to(path: Path) -> None:
    """Send standard output and error to a file: when one rank fails, the libraries of all the others write about it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def run_job(me: Rank, job: Job) -> Reply:
    """Run one job; every exception becomes a reply."""
    recorder = me.recorder
    mine = job.injection is not None and job.injection.rank == me.rank
    recorder.start(job.number, Injector(job.injection if mine else None))
    try:
        reply = Reply(result=find(job.task)(me, job.spec, job.seed), calls=recorder.calls)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        reply = Reply(None, message, traceback.format_exc(), recorder.failed, recorder.calls)
    recorder.say(State.DONE)
    return reply


def find(task: str) -> Any:
    """The callable that "package.module:attribute" names."""
    module, _, attribute = task.partition(":")
    return getattr(importlib.import_module(module), attribute)
