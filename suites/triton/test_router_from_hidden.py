"""The router's second entry: the gate's product and the routing from hidden states.

On small integers the logits are exact in fp32 in whatever order they are summed, so that the result must be, bit for
bit, that of the first entry on those logits.
"""

import pytest
import torch
from torch import Tensor

from moe_harness.impls.triton.router import router, router_from_hidden
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable

OPTIONS = {
    "qwen3": {"top_k": 2},
    "qwen2": {"top_k": 3, "renormalize": False},
    "deepseek-v3": {
        "top_k": 3, "scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
SIZES = [(1, 16, 8), (5, 33, 20), (70, 130, 60)] + [(2100, 2048, 128), (1030, 2000, 512)] * CUDA


def integers(*size: int, dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, size, generator=draw).to(DEVICE, dtype)


def check(x: Tensor, weight: Tensor, options: dict) -> None:
    logits = (x.double() @ weight.double().T).float()
    for got, want in zip(router_from_hidden(x, weight, **options), router(logits, **options), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("tokens", "hidden", "experts"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_equals_the_router_on_exact_logits(
    tokens: int, hidden: int, experts: int, dtype: torch.dtype, options: dict
) -> None:
    options = dict(options)
    if options.get("scoring") == "sigmoid":
        options["correction_bias"] = torch.linspace(0, 0.1, experts, device=DEVICE)
    weight = integers(experts, hidden, dtype=dtype, seed=1) * 2.0**-4
    check(integers(tokens, hidden, dtype=dtype, seed=0), weight, options)


def test_strides_are_honoured() -> None:
    x = integers(33, 9, dtype=torch.float32, seed=2).T
    weight = integers(33, 6, dtype=torch.float32, seed=3).T * 2.0**-4
    check(x, weight, OPTIONS["qwen3"])


def test_no_token_gives_empty_tensors() -> None:
    weights, ids = router_from_hidden(torch.empty(0, 8, device=DEVICE), torch.ones(4, 8, device=DEVICE), top_k=2)
    assert weights.shape == ids.shape == (0, 2)
