"""transformers' model of a checkpoint, with any experts inside: greedy answers, a batch at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate import identity
from moe_harness.harness.gate.answerers import plugging
from moe_harness.harness.gate.answerers.finding import DTYPES, Settings, registered_source
from moe_harness.harness.gate.answerers.tokens import Tokens, forced, gold_of, quiet
from moe_harness.harness.gate.exchange import Answer, Gold, Request

if TYPE_CHECKING:
    from torch import Tensor

GOLD_TOKENS = 16_384  # of one forward pass over gold answers: logits of a large vocabulary are what fills the memory


@dataclass(frozen=True)
class Begun:
    """Prompts that were read: their mask [B, L], the cache behind them, and the next token's logits [B, V]."""

    mask: "Tensor"
    cache: Any
    logits: "Tensor"


class TransformersModel:
    """Answers by the checkpoint's own class, whatever computes its experts.

    Args:
        implementation: a name that transformers knows; or
        stage, function, layer: what is put into every layer, or into one.
    """

    traceable = True

    def __init__(
        self, spec: str, settings: Settings, *, implementation: str | None = None, stage: str = "experts",
        function: Callable[..., Any] | None = None, layer: int | None = None,
    ):  # fmt: skip
        import torch
        from transformers import AutoModelForCausalLM

        if settings.tp * settings.ep > 1:
            raise UsageError(f"{spec} runs on one device; --tp and --ep are for models such as qwen3_moe")
        assert settings.model is not None
        self.spec, self.settings, self.function = spec, settings, function
        self.tokens = Tokens(settings.model)
        try:
            with quiet():
                self.model = AutoModelForCausalLM.from_pretrained(
                    settings.model, dtype=getattr(torch, DTYPES[settings.dtype]),
                    experts_implementation=implementation or "eager",
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise CannotJudge(f"transformers cannot load {settings.model}: {error}") from error
        self.model = self.model.to(settings.device).eval()  # type: ignore[arg-type]
        if function is not None:
            plugging.plug(self.model, stage, function, layer)

    def identity(self) -> dict[str, Any]:
        assert self.settings.model is not None
        own = None if self.function is None else identity.source_hash(self.function)
        if self.spec.startswith("transformers:"):
            own = registered_source(self.spec.partition(":")[2])
        return {
            "spec": self.spec, "source": own, "model": identity.model_hash(self.settings.model),
            "dtype": self.settings.dtype, "batch_size": self.settings.batch_size,
            **identity.surroundings(self.settings.device),
        }  # fmt: skip

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Greedy answers; CannotJudge for a temperature, which transformers' rows would not draw independently."""
        if any(request.temperature for request in requests):
            raise CannotJudge(
                "a task that samples needs a model whose draws depend on the row alone, such as qwen3_moe"
            )
        begun = self._begin([self.tokens.prompt(request) for request in requests])
        gold = self._golds_behind(begun, requests)
        new = self._continue(begun, requests)
        return [self.tokens.answer(r, ids, g) for r, ids, g in zip(requests, new, gold, strict=True)]

    def golds(self, requests: Sequence[Request]) -> list[Gold]:
        """The gold answers under teacher forcing."""
        return [
            found for part in self._parts(requests) for found in forced(
                self.tokens, part, lambda ids: self.model(ids, use_cache=False).logits, self.settings.device
            )
        ]  # fmt: skip

    def _parts(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        longest = max(len(self.tokens.gold(request)[0]) for request in requests)
        size = max(1, GOLD_TOKENS // longest)
        return [requests[first : first + size] for first in range(0, len(requests), size)]

    def generate(self, prompts: list[list[int]], requests: Sequence[Request]) -> list[list[int]]:
        """New tokens of each prompt."""
        return self._continue(self._begin(prompts), requests)

    def _begin(self, prompts: list[list[int]]) -> "Begun":
        """Read the prompts.  Shorter ones are filled up on the left, masked, with their own positions."""
        import torch

        device, longest = self.settings.device, max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            out = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        return Begun(mask, out.past_key_values, out.logits[:, -1])

    def _golds_behind(self, begun: "Begun", requests: Sequence[Request]) -> list[Gold]:
        """The gold answers behind prompts that were read already, which saves reading them once more.

        Over prompts of 400 tokens and answers of 50 that was a fifth of the time of a batch.
        """
        import torch

        answers = [whole[start:] for whole, start in map(self.tokens.gold, requests)]
        longest = max(map(len, answers))
        if len(answers) * longest > GOLD_TOKENS:
            return self.golds(requests)
        ids = torch.zeros(len(answers), longest, dtype=torch.long)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
        ids = ids[:, :-1].to(begun.mask.device)  # nothing follows the last token
        scores = begun.logits[:, None]
        with torch.inference_mode():
            if ids.numel():
                out = self.model(
                    ids, attention_mask=torch.cat((begun.mask, torch.ones_like(ids)), -1), use_cache=True,
                    position_ids=begun.mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
                    past_key_values=copy.deepcopy(begun.cache),
                )  # fmt: skip
                scores = torch.cat((scores, out.logits), 1)
            return [gold_of(row[: len(answer)], answer) for row, answer in zip(scores, answers, strict=True)]

    def _continue(self, begun: "Begun", requests: Sequence[Request]) -> list[list[int]]:
        """Greedy tokens until every row has ended; rows that have are taken out once they are half of the batch."""
        import torch

        found: list[list[int]] = [[] for _ in requests]
        rows = list(range(len(requests)))  # of the requests that are still in the batch
        mask, cache, logits = begun.mask, begun.cache, begun.logits
        positions, ended = mask.sum(-1, keepdim=True), set()
        with torch.inference_mode():
            while True:
                ids = logits.argmax(-1, keepdim=True)
                for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                    if row not in ended:
                        found[row].append(token)
                        if self._ended(found[row], requests[row]):
                            ended.add(row)
                left = [at for at, row in enumerate(rows) if row not in ended]
                if not left:
                    return found
                if 2 * len(left) <= len(rows) and _can_select(cache):
                    chosen = torch.tensor(left, device=ids.device)
                    cache.batch_select_indices(chosen)
                    ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
                    rows = [rows[at] for at in left]
                mask = torch.cat((mask, torch.ones_like(ids)), -1)
                out = self.model(
                    ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache, logits, positions = out.past_key_values, out.logits[:, -1], positions + 1

    def _ended(self, ids: list[int], request: Request) -> bool:
        if len(ids) >= request.max_new_tokens or ids[-1] in self.tokens.eos:
            return True
        # A stop string ends with the newest token, so the last few tell.
        window = max((len(stop) for stop in request.until), default=0) + 1
        return self.tokens.stopped(ids[-window:], request.until)


def _can_select(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: those of linear attention cannot."""
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))
