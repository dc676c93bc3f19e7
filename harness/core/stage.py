"""Each stage's side of the judgement: specs to tensors, and tensors to what a right result may be."""

from importlib import import_module
from types import ModuleType

from moe_harness.harness.core.contracts import check_stage


def stage_module(stage: str) -> ModuleType:
    """The module of a stage; it has `build`, `expect`, `laws` and what its checks ask for."""
    return import_module(f"moe_harness.harness.stages.{check_stage(stage)}.stage")
