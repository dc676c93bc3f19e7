"""Finds an implementation by its spec in a worker; the class is kept, so that a case costs no import."""

import functools
import inspect
from typing import Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.ranked_stage import find_ranked


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
    subject, asked = load(stage, spec), find_ranked(stage)
    kind, how = ("function", "called") if asked.is_function else ("class", "made")
    if not callable(subject):
        raise UsageError(
            f"{spec!r} is {type(subject).__name__}, but the stage {stage} takes a {kind}, {how} by {asked.call}"
        )
    try:
        inspect.signature(subject).bind(*asked.made_from, **dict.fromkeys(asked.named))
    except TypeError as error:
        raise UsageError(f"{spec!r} cannot be {how} by {asked.call}, as the stage {stage} does: {error}") from None
    except ValueError:  # built in C, nothing is known of its arguments
        pass
    return subject
