"""A model of the stage `model` over several ranks: a process each, all asked the same, the first one's answers kept."""

import inspect
import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError
from moe_harness.harness.gate.answerers.finding import Settings, resolve
from moe_harness.harness.gate.exchange import Answer, Request
from moe_harness.harness.process.start import start


class Ranks:
    """`tp` times `ep` ranks of one host, gloo on the CPU and NCCL on GPUs.

    Raises:
        UsageError: both at once, for a load_model without `expert_shards`, which the contract's has not.
        CannotJudge: a rank that cannot load the model, or that fails or dies later.
    """

    traceable = True

    def __init__(self, spec: str, settings: Settings):
        if settings.tp > 1 and settings.ep > 1 and not _shares_experts_twice(resolve(spec)[1]):
            raise UsageError("--tp and --ep are both above 1, but load_model takes no expert_shards: give one of them")
        self.spec, self.settings, self.world = spec, settings, settings.tp * settings.ep
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="accuracy-gate-ranks-")
        pipes = [context.Pipe() for _ in range(self.world)]
        self.processes = [
            context.Process(target=_serve, args=(theirs, spec, settings, rank, self.folder.name), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            start(process)
        for _, theirs in pipes:
            theirs.close()
        self.pipes: list[Connection] = [ours for ours, _ in pipes]
        self.about: dict[str, Any] = self._replies()[0]

    def identity(self) -> dict[str, Any]:
        return self.about

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        for pipe in self.pipes:
            pipe.send(list(requests))
        return list(self._replies()[0])

    def _replies(self) -> list[Any]:
        """One of each rank; the first that failed is told, since the others then wait for it for ever."""
        found: dict[int, Any] = {}
        while len(found) < self.world:
            ready = wait_for([pipe for rank, pipe in enumerate(self.pipes) if rank not in found])
            for rank, pipe in ((r, p) for r, p in enumerate(self.pipes) if p in ready):
                try:
                    kind, found[rank] = pipe.recv()
                except EOFError:
                    self.processes[rank].join(5)
                    kind, found[rank] = "died", f"its process ended with {self.processes[rank].exitcode}"
                if kind != "ok":
                    self.close()
                    raise CannotJudge(f"{self.spec}, rank {rank} of {self.world}: {found[rank]}")
        return [found[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the ranks; those that wait for another one do not end by themselves."""
        for process in self.processes:
            process.kill()


def _shares_experts_twice(function: Any) -> bool:
    """Whether a load_model takes `expert_shards`, or anything."""
    parameters = inspect.signature(function).parameters
    return "expert_shards" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _serve(pipe: Connection, spec: str, settings: Settings, rank: int, folder: str) -> None:
    """One rank: load, tell who it is, then answer batches until the pipe closes."""
    try:
        answerer = _loaded(spec, settings, rank, Path(folder))
        pipe.send(("ok", answerer.identity()))
        while True:
            answers = answerer.answer(pipe.recv())
            pipe.send(("ok", answers if rank == 0 else len(answers)))
    except EOFError:
        return
    except Exception as error:
        told = str(error) if isinstance(error, HarnessError) else traceback.format_exc(limit=-3)
        pipe.send(("failed", told))


def _loaded(spec: str, settings: Settings, rank: int, folder: Path) -> Any:
    import torch
    import torch.distributed as dist

    from moe_harness.harness.gate.answerers.contract import ContractModel

    cuda = settings.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder / 'store'}", rank=rank,
        world_size=settings.tp * settings.ep,
    )  # fmt: skip
    placed = replace(settings, device=f"cuda:{rank}" if cuda else settings.device)
    return ContractModel(spec, resolve(spec)[1], placed, group=dist.group.WORLD)
