"""Whole models in vLLM, for `generate` and `bench --stage model`: it hands out no logits.

Written against the interface of 0.22.1 (`LLM.generate` over prompts of ids); not run yet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed
from moe_harness.impls.vllm._common import INSTALL

__all__ = ["model"]


class Model:
    """An `LLM` under the contract's names."""

    def __init__(self, llm: Any):
        self.llm = llm

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits, which vLLM keeps to itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("vllm hands out no logits, so that its tokens alone can be compared")

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | Sequence[int], temperature: float = 0.0,
        seed: int = 0, stop_token_ids: Sequence[int] = (), ignore_eos: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens of every prompt, all prompts in one call."""
        parameters = needed("vllm", "SamplingParams", INSTALL)
        counts = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        options = [
            parameters(
                max_tokens=count, temperature=temperature, seed=seed if temperature > 0 else None,
                stop_token_ids=list(stop_token_ids), ignore_eos=ignore_eos, detokenize=False,
            )
            for count in counts
        ]  # fmt: skip
        found = self.llm.generate(asked, options, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in found]


def model(
    model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False,
    dispatcher: str = "local_allreduce",
) -> Model:  # fmt: skip
    """The stage `model` on one GPU, its prefix cache off.

    Raises:
        NotImplementedError: vllm is not installed, another device than cuda, a process group.
    """
    if torch.device(device).type != "cuda":
        raise NotImplementedError(f"vllm runs here on cuda only, not on {device}")
    if group is not None:
        raise NotImplementedError("vllm starts its ranks by itself: it takes no process group")
    llm = needed("vllm", "LLM", INSTALL)
    return Model(llm(str(model_dir), dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, seed=0))


model.devices = ("cuda",)
