"""A model by the contract: load_model(model_dir, *, device, dtype, ...), generate, and logits for gold answers."""

from collections.abc import Callable, Sequence
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate import identity
from moe_harness.harness.gate.answerers.finding import DTYPES, Settings
from moe_harness.harness.gate.answerers.tokens import Tokens, forced
from moe_harness.harness.gate.exchange import Answer, Request

FIRST = 64  # tokens before the first look for stop strings, which the contract's generate does not know
GOLD_ROWS = 32


class ContractModel:
    """Answers by `generate`; where a stop string has not come after some tokens, it goes on from there.

    Raises:
        UsageError: load_model refuses the checkpoint, the dtype or the ranks.
    """

    traceable = True

    def __init__(self, spec: str, function: Callable[..., Any], settings: Settings, group: Any = None):
        import torch

        assert settings.model is not None
        self.spec, self.settings, self.function = spec, settings, function
        self.tokens = Tokens(settings.model)
        options: dict[str, Any] = {} if settings.dispatcher is None else {"dispatcher": settings.dispatcher}
        if group is not None:
            options |= {"group": group, "expert_parallel": settings.ep > 1}
        if settings.tp > 1 and settings.ep > 1:
            options["expert_shards"] = settings.tp
        dtype = getattr(torch, DTYPES[settings.dtype])
        try:
            self.model = function(str(settings.model), device=settings.device, dtype=dtype, **options)
        except (ValueError, TypeError, NotImplementedError) as error:  # how the contract's load_model refuses
            raise UsageError(f"{spec} does not take this call: {error}") from error

    def identity(self) -> dict[str, Any]:
        settings = self.settings
        assert settings.model is not None
        return {
            "spec": self.spec, "source": identity.source_hash(self.function),
            "model": identity.model_hash(settings.model), "dtype": settings.dtype, "batch_size": settings.batch_size,
            "tp": settings.tp, "ep": settings.ep, "dispatcher": settings.dispatcher,
            **identity.surroundings(settings.device.partition(":")[0]),
        }  # fmt: skip

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        gold = [
            found for first in range(0, len(requests), GOLD_ROWS)
            for found in forced(self.tokens, requests[first : first + GOLD_ROWS], self.model, self.settings.device)
        ]  # fmt: skip
        new = self._generate(requests)
        return [self.tokens.answer(r, ids, g) for r, ids, g in zip(requests, new, gold, strict=True)]

    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        prompts = [self.tokens.prompt(request) for request in requests]
        found: list[list[int]] = [[] for _ in requests]
        waiting, size = list(range(len(requests))), FIRST
        sampled = {request.temperature for request in requests if request.temperature}
        if sampled:  # a draw depends on the position in one call, so it is not cut into several
            size = max(request.max_new_tokens for request in requests)
        while waiting:
            left = [requests[i].max_new_tokens - len(found[i]) for i in waiting]
            new = self.model.generate(
                [prompts[i] + found[i] for i in waiting], max_new_tokens=[min(size, n) for n in left],
                temperature=max(sampled, default=0.0), seed=requests[waiting[0]].repeat,
                stop_token_ids=tuple(sorted(self.tokens.eos)),
            )  # fmt: skip
            if len(new) != len(waiting):
                raise CannotJudge(f"generate was given {len(waiting)} prompts and returned {len(new)} answers")
            for i, ids in zip(waiting, new, strict=True):
                found[i] += [int(token) for token in ids]
            waiting = [
                i for i, ids, n in zip(waiting, new, left, strict=True)
                if 0 < len(ids) < n and not self.tokens.stopped(found[i], requests[i].until)
            ]  # fmt: skip
            size *= 2
        return found
