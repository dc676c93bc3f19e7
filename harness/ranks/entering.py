"""The one way from a rank into code under judgement: what it refuses is told from what goes wrong in it."""

from collections.abc import Callable
from typing import Any

from moe_harness.harness.core import blame
from moe_harness.harness.core.contracts import REJECTIONS
from moe_harness.harness.core.defaults import kept_defaults
from moe_harness.harness.ranks.worker import Rank


class Refused(Exception):
    """The implementation refuses the case, as the contract allows."""


def enter(me: Rank, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call `function`, which is judged, and put back what it sets for the whole process.

    Raises:
        Refused: it raised one of the contract's exceptions, by a `raise` of its own and not out of a collective.
    """
    try:
        with kept_defaults():
            return blame.hand_over(function, *arguments, **keywords)
    except REJECTIONS as error:
        if me.recorder.failed is not None or blame.is_judges(error) or not blame.own_refusal(error):
            raise
        raise Refused(f"{type(error).__name__}: {error}") from error
