"""One call on several ranks of this machine, as a command makes it: started, listened to, and ended together.

    with Launched("package.module:function", argument, ranks=2, cuda=False) as call:
        for word in call.words(): ...        what rank 0 says meanwhile
        call.tell(word)                      something for every rank to hear
        call.results                         what the function returned on each rank

A rank that dies or raises ends all others at once, and is the one that is told of: those that only waited for it are
not.  Under torchrun, which has started the ranks already, `joined` gives this process its group instead.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, HarnessError
from moe_harness.harness.process.parent_watch import end_with
from moe_harness.harness.process.start import fork_server, make_folder, remove_folder, start

FIRST_CAUSE = 0.3  # seconds in which a death that made others fail has to show
PATIENCE = timedelta(minutes=30)  # of a collective; deaths are noticed otherwise


@dataclass(frozen=True)
class Member:
    """A rank of the call: what the function is given first.

    `say` sends something to whoever listens; only rank 0 is heard.  `hear` waits for the next word for all ranks;
    EOFError where nobody will say any more.
    """

    rank: int
    ranks: int
    group: Any
    say: Callable[[Any], None]
    hear: Callable[[], Any]


class Launched:
    """The ranks of one call.

    Args:
        function: of a Member and `argument`, by its place "package.module:name".

    Raises, from `words`:
        HarnessError: a rank's own, of the same kind.
        CannotJudge: a rank that died or raised anything else; which one and how.
    """

    def __init__(self, function: str, argument: Any, *, ranks: int, cuda: bool):
        self.ranks = ranks
        self.results: list[Any] = [None] * ranks
        self.folder = make_folder()
        self.open: dict[int, connection.Connection] = {}
        self.processes = []
        context = fork_server()
        for rank in range(ranks):
            self.open[rank], theirs = context.Pipe()
            given = (theirs, function, argument, rank, ranks, cuda, self.folder)
            self.processes.append(context.Process(target=_serve, args=given, daemon=True))
            start(self.processes[-1])
            theirs.close()
        self.pipes = dict(self.open)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def tell(self, word: Any) -> None:
        """Send something to every rank; one that is gone is told of by `words`."""
        for pipe in self.open.values():
            with contextlib.suppress(OSError):
                pipe.send(word)

    def words(self) -> Iterator[Any]:
        """What rank 0 says, until every rank has returned."""
        while self.open:
            for pipe in connection.wait(list(self.open.values())):
                rank = next(rank for rank, known in self.open.items() if known is pipe)
                kind, content = self._received(rank)
                if kind == "said":
                    yield content
                    continue
                del self.open[rank]
                if kind == "returned":
                    self.results[rank] = content
                else:
                    self._fail({rank: (kind, content)})

    def _received(self, rank: int) -> tuple[str, Any]:
        try:
            return self.open[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join(1.0)
            return "died", self.processes[rank].exitcode

    def _fail(self, failed: dict[int, tuple[str, Any]]) -> None:
        """End all ranks and tell of the first cause: a death before a complaint, a complaint before its echoes."""
        deadline = time.monotonic() + FIRST_CAUSE
        while self.open and time.monotonic() < deadline and not any(kind == "died" for kind, _ in failed.values()):
            for pipe in connection.wait(list(self.open.values()), 0.05):
                rank = next(rank for rank, known in self.open.items() if known is pipe)
                kind, content = self._received(rank)
                if kind != "said":
                    del self.open[rank]
                    failed |= {rank: (kind, content)} if kind != "returned" else {}
        self.close()
        order = ("died", "refused", "raised")
        rank = min(failed, key=lambda rank: (order.index(failed[rank][0]), rank))
        kind, content = failed[rank]
        if kind == "refused":
            raise content
        told = _end(content) if kind == "died" else f"raised {content}"
        raise CannotJudge(f"rank {rank} of {self.ranks} {told}; the other ranks were ended")

    def close(self) -> None:
        """End the ranks that are left; nothing of them stays."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process, pipe in zip(self.processes, self.pipes.values(), strict=True):
            process.join()
            pipe.close()
        remove_folder(self.folder)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with the exit status {code} before it had returned"


def _serve(pipe: Any, function: str, argument: Any, rank: int, ranks: int, cuda: bool, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from moe_harness.harness.ranks.worker import find

    os.setsid()  # Ctrl-C is for the command, which ends this process
    end_with(pipe)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        _join(cuda, rank, ranks, store=store)
        say = (lambda word: pipe.send(("said", word))) if rank == 0 else _unheard
        pipe.send(("returned", find(function)(Member(rank, ranks, dist.group.WORLD, say, pipe.recv), argument)))
    except Exception as error:
        told = ("refused", error) if isinstance(error, HarnessError) else ("raised", f"{type(error).__name__}: {error}")
        pipe.send(told)
        while True:  # until it is ended: its going would make others fail, who have done nothing wrong
            signal.pause()
    os._exit(0)  # a clean shutdown would wait for peers


def _join(cuda: bool, rank: int, ranks: int, **where: Any) -> None:
    import torch
    import torch.distributed as dist

    backend, devices = "gloo", torch.cuda.device_count() if cuda else 0
    if cuda:
        if devices < 1:
            raise CannotJudge("ranks on cuda need a GPU each, but there is none")
        torch.cuda.set_device(rank % devices)
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else ranks
        backend = "nccl" if here <= devices else "gloo"  # nccl refuses two ranks on one GPU
        if backend == "gloo" and rank == 0:
            shared = f"{here} ranks share {devices} GPU{'s' * (devices > 1)}"
            print(f"{shared} over gloo, through the host's memory: right answers, but no speed to judge by",
                  file=sys.stderr)  # fmt: skip
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=PATIENCE, **where)


def _unheard(word: Any) -> None:
    """Only rank 0 is heard."""


def _unsaid() -> Any:
    """Nobody tells the ranks of torchrun anything."""
    raise EOFError


def under_torchrun() -> int:
    """How many ranks torchrun has started, this process among them; 0 where it has not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@contextlib.contextmanager
def joined(cuda: bool) -> Iterator[Member]:
    """This process as one of the ranks that torchrun has started."""
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), under_torchrun()
    _join(cuda, rank, ranks)
    try:
        yield Member(rank, ranks, dist.group.WORLD, _unheard, _unsaid)
    finally:
        dist.destroy_process_group()
