"""Text to tokens and back: prompts, stop strings across the borders of tokens, gold answers under teacher forcing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate.exchange import LIKELIEST, Answer, Gold, Request


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bar for loading weights: ours shows what takes time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Tokens:
    """The checkpoint's tokenizer, and how long a sequence its model takes."""

    def __init__(self, folder: Path):
        from transformers import AutoConfig, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.config = AutoConfig.from_pretrained(folder)
        except Exception as error:
            raise CannotJudge(f"the tokenizer or config of {folder} cannot be read: {error}") from error
        self.longest = int(getattr(self.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        eos = getattr(self.config, "eos_token_id", None)
        self.eos = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def prompt(self, request: Request) -> list[int]:
        """The whole prompt; CannotJudge where it does not fit with its answer: a cut prompt asks something else."""
        ids = self.encode(request.prompt)
        if len(ids) + request.max_new_tokens > self.longest:
            raise CannotJudge(
                f"question {request.doc_id} has {len(ids)} tokens, and {request.max_new_tokens} for the answer; the "
                f"model takes {self.longest}: fewer examples (--shots) or a shorter answer (--max-new-tokens)"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def gold(self, request: Request) -> tuple[list[int], int]:
        """Prompt and gold answer as one sequence, and where the answer begins in it."""
        prompt, whole = self.encode(request.prompt), self.encode(request.prompt + request.gold)
        if whole[: len(prompt)] != prompt:  # a token across the border: then the two are read one by one
            whole = prompt + self.encode(request.gold)
        return whole, len(prompt)

    def answer(self, request: Request, ids: Sequence[int], gold: Gold | None) -> Answer:
        """What was generated, cut where the first stop string begins or the model ended."""
        ended = next((i for i, token in enumerate(ids) if token in self.eos), None)
        kept = list(ids if ended is None else ids[:ended])[: request.max_new_tokens]
        text = self.decode(kept)
        stopped = cut(text, request.until)
        if stopped is not None:
            return Answer(request.key, stopped, self.tokens_until(kept, request.until), "stop", gold)
        return Answer(request.key, text, len(kept), "length" if ended is None else "eos", gold)

    def stopped(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        """Whether an answer is complete."""
        return any(token in self.eos for token in ids) or cut(self.decode(ids), until) is not None

    def tokens_until(self, ids: Sequence[int], until: Sequence[str]) -> int:
        """How many tokens it took to complete the first stop string."""
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cut(self.decode(ids[:middle]), until) is not None else (middle, high)
        return high


def cut(text: str, until: Sequence[str]) -> str | None:
    """The text before the earliest stop string; None where none has come."""
    places = [text.find(stop) for stop in until if stop in text]
    return text[: min(places)] if places else None


def forced(tokens: Tokens, requests: Sequence[Request], logits: Callable[[Any], Any], device: str) -> list[Gold]:
    """The gold answers of a batch in one forward pass.

    Args:
        logits: input_ids [B, L] to logits [B, L, V].  Rows are filled up at their end, which causal attention never
            sees from before.
    """
    import torch

    sequences = [tokens.gold(request) for request in requests]
    ids = torch.zeros(len(sequences), max(len(whole) for whole, _ in sequences), dtype=torch.long)
    for row, (whole, _) in enumerate(sequences):
        ids[row, : len(whole)] = torch.tensor(whole)
    with torch.inference_mode():
        scores = logits(ids.to(device))
        return [
            gold_of(scores[row, start - 1 : len(whole) - 1], whole[start:])
            for row, (whole, start) in enumerate(sequences)
        ]


def gold_of(logits: Any, wanted: list[int]) -> Gold:
    """From the logits [n, V] before each of the n tokens, in fp64: a sure model's differ behind the digits of fp32."""
    import torch

    logprobs = torch.log_softmax(logits.double(), -1)
    if bool(torch.isnan(logprobs).any()):
        return Gold(float("nan"), tuple(wanted), (-1,) * len(wanted), ((),) * len(wanted))
    each = logprobs[torch.arange(len(wanted), device=logprobs.device), torch.tensor(wanted, device=logprobs.device)]
    values, places = logprobs.topk(min(LIKELIEST, logprobs.shape[-1]), dim=-1)
    rows = list(zip(places.tolist(), values.round(decimals=9).tolist(), strict=True))
    likeliest = tuple(tuple(zip(of, each_of, strict=True)) for of, each_of in rows)
    return Gold(float(each.sum()), tuple(wanted), tuple(of[0] for of, _ in rows), likeliest)
