"""Engines whose greedy tokens are right and that break one of the other promises of `generate` each."""

from collections.abc import Callable
from typing import Any

from moe_harness.impls.qwen3_moe.model import Model
from moe_harness.suites.model.wrong_models import calls


def deaf_to(*names: str) -> Callable[..., Any]:
    """Leaves these arguments out."""

    def generate(self: Model, prompts: list, **options: Any) -> list:
        return Model.generate(self, prompts, **{key: value for key, value in options.items() if key not in names})

    return calls(generate=generate)


def as_many_for_all(self: Model, prompts: list, *, max_new_tokens: Any, **options: Any) -> list:
    most = max_new_tokens if isinstance(max_new_tokens, int) else max(max_new_tokens)
    return Model.generate(self, prompts, max_new_tokens=most, **options)


def end_always(self: Model, prompts: list, ignore_eos: bool = False, **options: Any) -> list:
    return Model.generate(self, prompts, **options)


def kept_by_prefix(self: Model, prompts: list, **options: Any) -> list:
    """A page of 16 that is found again by its first eight tokens alone."""
    kept = self.__dict__.setdefault("kept", {})
    found = []
    for prompt in prompts:
        key = (*prompt[:8], len(prompt) > 16)
        if key not in kept or len(prompt) < 16:
            (kept[key],) = Model.generate(self, [prompt], **options)
        found.append(kept[key])
    return found


def written_into(self: Model, prompts: list, **options: Any) -> list:
    found = Model.generate(self, prompts, **options)
    for prompt, tokens in zip(prompts, found, strict=True):
        prompt += tokens
    return found


def heated(change: Callable[[float], float]) -> Callable[..., Any]:
    def generate(self: Model, prompts: list, temperature: float = 0.0, **options: Any) -> list:
        return Model.generate(self, prompts, temperature=change(temperature), **options)

    return calls(generate=generate)


def drawn_anew(self: Model, prompts: list, seed: int = 0, **options: Any) -> list:
    self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
    return Model.generate(self, prompts, seed=1000 + self.__dict__["asked"], **options)


stop_tokens_ignored = deaf_to("stop_token_ids")
end_of_sequence_ignored = calls(
    generate=lambda self, prompts, **o: Model.generate(self, prompts, **o | {"ignore_eos": True})
)
end_of_sequence_never_ignored = calls(generate=end_always)
one_count_for_all = calls(generate=as_many_for_all)
prefix_taken_for_the_prompt = calls(generate=kept_by_prefix)
prompts_written_into = calls(generate=written_into)
temperature_ignored = heated(lambda temperature: 1.0 if temperature else 0.0)
temperature_squared = heated(lambda temperature: temperature**2)
always_greedy = deaf_to("temperature")
seed_ignored = deaf_to("seed")
seeds_of_its_own = calls(generate=drawn_anew)
# What the judge has to say of each.
SAID = {
    "stop_tokens_ignored": ("stops", "at which it should end"),
    "end_of_sequence_ignored": ("stops", "at which it should end"),
    "end_of_sequence_never_ignored": ("stops", "ends after"),
    "one_count_for_all": ("counts", "wanted at most"),
    "prefix_taken_for_the_prompt": ("again", "with two of their tokens behind them"),
    "prompts_written_into": ("counts", "has written into the prompts"),
    "temperature_ignored": ("temperature", "the temperature is ignored"),
    "temperature_squared": ("temperature", "divided by the temperature twice"),
    "always_greedy": ("temperature", "nothing is drawn"),
    "seed_ignored": ("temperature", "nothing is drawn"),
    "seeds_of_its_own": ("temperature", "a second call with the same seed"),
}
