"""A model of the stage `model` over several ranks: a process each, all asked the same, the first one's answers kept."""

import atexit
import inspect
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError
from moe_harness.harness.gate.answerers.finding import Settings, resolve
from moe_harness.harness.gate.exchange import Answer, Request
from moe_harness.harness.ranks.launch import Launched, Member


class Ranks:
    """`tp` times `ep` ranks of one host, gloo on the CPU and NCCL on GPUs.

    Raises:
        UsageError: both at once, for a load_model without `expert_shards`, which the contract's has not; or whatever
            load_model refuses.
        CannotJudge: a rank that cannot load the model, or that fails or dies later.
    """

    traceable = True

    def __init__(self, spec: str, settings: Settings):
        if settings.tp > 1 and settings.ep > 1 and not _shares_experts_twice(resolve(spec)[1]):
            raise UsageError("--tp and --ep are both above 1, but load_model takes no expert_shards: give one of them")
        self.spec, ranks, cuda = spec, settings.tp * settings.ep, settings.device == "cuda"
        self.launched = Launched(f"{__name__}:answer_as_rank", (spec, settings), ranks=ranks, cuda=cuda)
        atexit.register(self.close)
        self.words = self.launched.words()
        self.about: dict[str, Any] = self._next()

    def identity(self) -> dict[str, Any]:
        return self.about

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.launched.tell(list(requests))
        return list(self._next())

    def _next(self) -> Any:
        """What rank 0 says; the first rank that failed is told, since the others then wait for it for ever."""
        try:
            return next(self.words)
        except UsageError:
            raise
        except HarnessError as error:
            raise CannotJudge(f"{self.spec}: {error}") from None

    def close(self) -> None:
        """End the ranks; those that wait for another one do not end by themselves."""
        atexit.unregister(self.close)
        self.launched.close()


def _shares_experts_twice(function: Any) -> bool:
    """Whether a load_model takes `expert_shards`, or anything."""
    parameters = inspect.signature(function).parameters
    return "expert_shards" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def answer_as_rank(me: Member, given: tuple[str, Settings]) -> None:
    """One rank: load, say who it is, then answer batches for as long as it is asked."""
    try:
        answerer = _loaded(me, *given)
        me.say(answerer.identity())
        while True:
            me.say(answerer.answer(me.hear()))
    except EOFError:
        return
    except UsageError:  # every rank refuses alike
        raise
    except Exception as error:
        told = str(error) if isinstance(error, HarnessError) else traceback.format_exc(limit=-3)
        raise CannotJudge(f"rank {me.rank} of {me.ranks}: {told}") from None


def _loaded(me: Member, spec: str, settings: Settings) -> Any:
    import torch

    from moe_harness.harness.gate.answerers.contract import ContractModel

    device = f"cuda:{torch.cuda.current_device()}" if settings.device == "cuda" else settings.device
    return ContractModel(spec, resolve(spec)[1], replace(settings, device=device), group=me.group)
