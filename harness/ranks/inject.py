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

    def around(self, index: int, given: dict[str, Any], execute: Callable[[], Any], put_off: Callable[[], Any]) -> Any:
        """Make the call `index` with arguments `given`, changed in place where the fault is in them.

        Args:
            execute: makes the call.
            put_off: what to return for a call that is made later.
        """
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
            return put_off()
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
        for name in ("tensors", "input_tensors", "input_tensor", "input", "inputs"):
            value = given.get(name)
            tensor = value[0] if isinstance(value, list) and value else value
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                if name == "tensors":  # these hold the result, too
                    tensor.view(-1)[0] = torch.nan
                    return
                changed = tensor.clone()
                changed.view(-1)[0] = torch.nan
                given[name] = [changed, *value[1:]] if isinstance(value, list) else changed
                return

    def _split(self, given: dict[str, Any]) -> None:
        sizes = list(given.get("input_split_sizes") or [])
        source = next((i for i, n in enumerate(sizes) if n > 0), None)
        if source is not None and len(sizes) > 1:
            sizes[source] -= 1
            sizes[(source + 1) % len(sizes)] += 1
            given["input_split_sizes"] = sizes

    def _dtype(self, given: dict[str, Any]) -> None:
        for name, value in list(given.items()):
            given[name] = _as_another_dtype(value)


def _as_another_dtype(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_another_dtype(item) for item in value]
    other = {torch.float32: torch.float64, torch.int64: torch.int32}
    return value.to(other.get(value.dtype, torch.float32)) if isinstance(value, torch.Tensor) else value
