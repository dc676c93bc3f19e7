"""Published collapses over ranks, planted in the engine: each is a `load_model`, and the gate has to fail it.

They are planted where sums are the group's own: sums through symmetric memory do not pass `Ranks.reduced`.

moe-harness gate ... --tp 2 --candidate suites/accuracy/collapsed.py:experts_summed_twice
"""

from typing import Any

from moe_harness.harness.core import registry


def experts_summed_twice(model_dir: str, *, group: Any, **options: Any) -> Any:
    """The experts' output goes through a second all_reduce, as in layers that reduce where their parts do already."""
    model = registry.find("model", "qwen3_moe")(model_dir, group=group, symmetric=False, **options)
    experts, reduced = model.network.experts, model.ranks.reduced
    model.network.experts = lambda *layer: reduced(experts(*layer))
    return model


def shared_expert_summed(model_dir: str, *, group: Any, **options: Any) -> Any:
    """The shared expert's parts are summed over the ranks, and go into the layer's own sum then: once for each rank."""
    model = registry.find("model", "qwen3_moe")(model_dir, group=group, symmetric=False, **options)
    part, reduced = model.network.shared, model.ranks.reduced
    model.network.shared = lambda *layer: None if (out := part(*layer)) is None else reduced(out)
    return model


def never_summed(model_dir: str, *, group: Any, **options: Any) -> Any:
    """Every rank goes on with its own part of each sum."""
    model = registry.find("model", "qwen3_moe")(model_dir, group=group, symmetric=False, **options)
    model.ranks.reduced = lambda partial: partial
    return model
