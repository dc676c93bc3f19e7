"""How published bugs are planted: registered with their address, put in by changing one function of the engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytest import MonkeyPatch

NV = "github.com/GeeeekExplorer/nano-vllm"
MS = "github.com/sgl-project/mini-sglang"
V = "github.com/vllm-project/vllm"


@dataclass(frozen=True)
class Planted:
    """One fault: what it is, where it was published, who sees it, and how it is put in."""

    name: str
    source: str
    where: str  # "machine", "network" or "function"
    plant: Callable[[MonkeyPatch], Any]


FAULTS: dict[str, Planted] = {}


def fault(source: str, where: str = "machine") -> Callable[[Callable[[MonkeyPatch], Any]], None]:
    """Register the decorated function under its name."""

    def register(plant: Callable[[MonkeyPatch], Any]) -> None:
        FAULTS[plant.__name__] = Planted(plant.__name__, source, where, plant)

    return register


def around(patch: MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace owner.name by change(original, *arguments)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))
