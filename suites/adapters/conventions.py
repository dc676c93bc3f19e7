"""What stand-ins have in common: how they take a library's place, and what they look at and compute."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.contracts import load

INT, FLOAT, FP8 = torch.int32, torch.float32, torch.float8_e4m3fn


def put(monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> None:
    """A module of that name, and of the packages around it, as long as the test runs."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, value in contents.items():
        monkeypatch.setattr(sys.modules[module], name, value, raising=False)


def plain(stage: str, spec: str) -> Callable[..., Any]:
    return load(stage, spec).function


def holds(tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    """What a kernel reads without asking: the dtype and the number of dimensions."""
    assert (tensor.dtype, tensor.dim()) == (dtype, dims), (tensor.dtype, tuple(tensor.shape))


def aligned(topk_ids: Tensor, block: int, experts: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by expert in whole blocks, padded by their number; the expert of each block; how many entries count.

    Experts from `first` on: of ids below, vllm reads and writes outside of its counters.
    """
    assert not bool((topk_ids < first).any())
    holds(topk_ids, INT, 2)
    assert topk_ids.is_contiguous()
    slots, owners = [], []
    for expert in range(first, experts):
        own = (topk_ids.flatten() == expert).nonzero().flatten()
        blocks = -(-len(own) // block)
        slots += [own, own.new_full((blocks * block - len(own),), topk_ids.numel())]
        owners += blocks * [expert]
    found = torch.cat(slots).int()
    room = torch.full((3 * block,), 1 << 30, dtype=INT)  # behind the entries that count there may be anything
    return torch.cat([found, room]), torch.tensor(owners + 3 * [0], dtype=INT), torch.tensor([len(found)], dtype=INT)


def routed(logits: Tensor, top_k: int, scoring: str, renormalize: bool, **more: Any) -> tuple[Tensor, Tensor]:
    weights, ids = plain("router", "torch:loop")(logits, top_k=top_k, scoring=scoring, renormalize=renormalize, **more)
    return weights, ids.int()
