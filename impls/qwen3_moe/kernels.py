"""The kernels that a model runs on, by the names of the contracts: Triton's on a GPU, torch's on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

NAMES = (
    "rms_norm", "rope_cache", "paged_attention", "sampler", "router", "experts", "shared_expert_gate",
    "latent_attention", "sigmoid_gate", "delta_walk",
)  # fmt: skip
# Functions of impls.torch that do not have their stage's name.
VARIANTS = {("torch", name): "loop" for name in ("router", "experts", "shared_expert_gate")}


@dataclass(frozen=True)
class Joined:
    """What a decoding step joins where its library can: fewer launches for the same numbers."""

    router: Callable[..., tuple[Tensor, Tensor]]  # from hidden states, pad rows left out
    experts_by_slot: Callable[..., Tensor]
    sum_norm: Callable[..., tuple[Tensor, Tensor]]  # the experts' sum, the residual and the next norm
    projection: Callable[[Tensor, Tensor], Tensor | None]  # in parts, which the next norm adds up; None: no gain
    norm_of_parts: Callable[..., tuple[Tensor, Tensor]]
    rope_cache: Callable[..., Tensor]  # these two of positions and lengths that the step began with
    paged_attention: Callable[..., Tensor]
    delta_step: Callable[..., Tensor]  # a whole gated delta net between its projections
    shard_words: Callable[..., Tensor]  # candidates of a shard of the vocabulary, and the best of all shards'
    pick: Callable[..., Tensor]


@dataclass(frozen=True)
class Kernels:
    """One function of each stage, with the stage's signature."""

    rms_norm: Callable[..., Any]
    rope_cache: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    sampler: Callable[..., Tensor]
    router: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    shared_expert_gate: Callable[..., Tensor]
    latent_attention: Callable[..., Tensor]  # of no stage, as the two below: modules in impls.torch say what they take
    sigmoid_gate: Callable[..., Tensor]
    delta_walk: Callable[..., Tensor]
    best_in_shard: Callable[..., tuple[Tensor, Tensor, Tensor]]  # the sampler's, of a part of the vocabulary
    joined: Joined | None = None

    @classmethod
    def of(cls, library: str) -> "Kernels":
        """The kernels of `library`, "triton" or "torch"; ValueError for any other."""
        if library not in ("triton", "torch"):
            raise ValueError(f"kernels is {library!r}, wanted 'triton' or 'torch'")
        found = {}
        for name in NAMES:
            module = import_module(f"moe_harness.impls.{library}.{name}")
            found[name] = getattr(module, VARIANTS.get((library, name), name))
        sampling = import_module(f"moe_harness.impls.{library}.sampler")
        return cls(**found, best_in_shard=sampling.best_in_shard, joined=_joined() if library == "triton" else None)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold them; one that waits for the host, or does not say, forbids it."""
        return all(getattr(getattr(self, name), "graph_capturable", False) for name in NAMES)

    @classmethod
    def for_device(cls, device: torch.device) -> "Kernels":
        """Those that are fastest on `device`."""
        return cls.of("triton" if device.type == "cuda" else "torch")


def _joined() -> Joined:
    from moe_harness.impls.triton.delta_step import delta_step
    from moe_harness.impls.triton.experts import experts_by_slot
    from moe_harness.impls.triton.paged_attention import paged_attention_of_step
    from moe_harness.impls.triton.projection import projection
    from moe_harness.impls.triton.rms_norm import norm_of_parts
    from moe_harness.impls.triton.rope_cache import rope_cache_of_step
    from moe_harness.impls.triton.router import router_from_hidden
    from moe_harness.impls.triton.shards import pick, shard_words
    from moe_harness.impls.triton.sum_norm import sum_norm

    return Joined(
        router=router_from_hidden,
        experts_by_slot=experts_by_slot,
        sum_norm=sum_norm,
        projection=projection,
        rope_cache=rope_cache_of_step,
        norm_of_parts=norm_of_parts,
        paged_attention=paged_attention_of_step,
        delta_step=delta_step,
        shard_words=shard_words,
        pick=pick,
    )
