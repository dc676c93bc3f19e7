"""Faults injected from outside at a numbered collective of one rank: what a machine or a bad peer would do."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_harness.harness.ranks.jobs import Injection

LATE_SECONDS = 0.4


class InjectedError(Exception):
    """Raised by the injection "raise"."""


class Injector:
    """Applies at most one injection to the calls of this rank; without one it passes everything through."""

    def __init__(self, injection: Injection | None = None):
        self.injection = injection
        self.deferred: Callable[[], Any] | None = None
        self.done = False

    def around(self, index: int, name: str, given: dict[str, Any], execute: Callable[[], Any]) -> Any:
        """Make the call `index` with arguments `given` (changed in place where the fault is in them)."""
        if self.deferred is not None:
            deferred, self.deferred = self.deferred, None
            result = execute()
            deferred()
            return result
        if self.injection is None or self.done or index != self.injection.call:
            return execute()
        self.done = True
        if self.injection.kind == "swap":
            self.deferred = execute
            return None
        getattr(self, f"_{self.injection.kind}")(given)
        return execute()

    def _die(self, given: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _exit(self, given: dict[str, Any]) -> None:
        os._exit(0)

    def _raise(self, given: dict[str, Any]) -> None:
        raise InjectedError("injected before the call")

    def _hang(self, given: dict[str, Any]) -> None:
        while True:
            time.sleep(3600)

    def _late(self, given: dict[str, Any]) -> None:
        time.sleep(LATE_SECONDS)

    def _nan(self, given: dict[str, Any]) -> None:
        for name in ("tensor", "input", "input_tensor"):
            tensor = given.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                given[name] = tensor if name == "tensor" else tensor.clone()
                given[name].view(-1)[0] = torch.nan
                return

    def _split(self, given: dict[str, Any]) -> None:
        sizes = list(given.get("input_split_sizes") or [])
        source = next((i for i, n in enumerate(sizes) if n > 0), None)
        if source is not None and len(sizes) > 1:
            sizes[source] -= 1
            sizes[(source + 1) % len(sizes)] += 1
            given["input_split_sizes"] = sizes

    def _dtype(self, given: dict[str, Any]) -> None:
        other = {torch.float32: torch.float64, torch.int64: torch.int32}
        for name, value in list(given.items()):
            if isinstance(value, torch.Tensor):
                given[name] = value.to(other.get(value.dtype, torch.float32))
