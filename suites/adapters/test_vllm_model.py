"""vLLM's whole models: each prompt with its own number of tokens, in the order of the prompts."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_harness.harness.core.contracts import load
from moe_harness.suites.adapters import conventions

GIVEN: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


class LLM:
    def __init__(self, model: str, *, dtype: torch.dtype, skip_tokenizer_init: bool, enable_prefix_caching: bool,
                 seed: int):  # fmt: skip
        assert (model, dtype, skip_tokenizer_init, enable_prefix_caching) == ("DIR", torch.bfloat16, True, False)

    def generate(self, prompts: list[dict], params: list[SimpleNamespace], use_tqdm: bool) -> list[SimpleNamespace]:
        assert not use_tqdm and all(p.ignore_eos and not p.detokenize and p.stop_token_ids == [3] for p in params)
        tokens = [
            [prompt["prompt_token_ids"][0]] * asked.max_tokens for prompt, asked in zip(prompts, params, strict=True)
        ]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for ids in tokens]


def test_prompts_and_counts_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    conventions.put(monkeypatch, "vllm", LLM=LLM, SamplingParams=SimpleNamespace)
    model = load("model", "vllm").function("DIR", **GIVEN)
    asked: dict[str, Any] = {"stop_token_ids": (3,), "ignore_eos": True}
    assert model.generate([[5, 6], [7]], max_new_tokens=[1, 3], **asked) == [[5], [7, 7, 7]]
    assert model.generate([[9]], max_new_tokens=2, temperature=0.5, seed=4, **asked) == [[9, 9]]
    with pytest.raises(NotImplementedError, match="no logits"):
        model(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"device": "cpu"}, "cuda only"), ({"group": object()}, "no process group"), ({}, "vllm==")],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(NotImplementedError, match=message):
        load("model", "vllm").function("DIR", **GIVEN | changed)
