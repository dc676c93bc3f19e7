"""Finds an implementation by its spec in a worker; the class is kept, so that a case costs no import."""

import functools
import inspect
from typing import Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import UsageError

# How the contract calls what it takes of each stage: positional arguments, and the names of the others.
CALLED_BY = {
    "dispatcher": (("group",), ("num_experts", "owner")),
    "parallel_linear": (("num_experts", "in_features", "out_features"), ("rank", "world_size", "dtype", "device")),
    "reduction": (("routed", "shared", "group"), ("routed_state", "shared_state", "rows")),
}
FUNCTIONS = ("reduction",)


@functools.cache
def load(stage: str, spec: str) -> Any:
    """The attribute that `spec` names (registered name, module:attribute or file.py:attribute).

    Raises:
        UsageError: no such name, file or attribute.
        CannotJudge: the module fails while it is imported.
    """
    return registry.find(stage, spec)


def warm(me: Any, spec: dict[str, str], seed: int) -> None:
    """Task: import the implementation, which may take longer than any case."""
    load(spec["stage"], spec["impl"])


@functools.cache
def load_checked(stage: str, spec: str) -> Any:
    """As `load`, for a class or function that the contract's arguments fit.

    Raises:
        UsageError: as `load`, and where it cannot be called, or takes other arguments.
    """
    subject, (positional, named) = load(stage, spec), CALLED_BY[stage]
    call = f"({', '.join([*positional, *(f'{name}=...' for name in named)])})"
    kind, how = ("function", "called") if stage in FUNCTIONS else ("class", "made")
    if not callable(subject):
        raise UsageError(f"{spec!r} is {type(subject).__name__}, but the stage {stage} takes a {kind}, {how} by {call}")
    try:
        inspect.signature(subject).bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        raise UsageError(f"{spec!r} cannot be {how} by {call}, as the stage {stage} does: {error}") from None
    except ValueError:  # built in C, nothing is known of its arguments
        pass
    return subject
