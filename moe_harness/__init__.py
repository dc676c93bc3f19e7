"""The one name under which everything is imported and installed.

    from moe_harness import check
    check(my_kernel, "experts")

In the tree, the folders beside this one keep their plain names and are linked here: `moe_harness.harness` is `harness/`
from a checkout as well as from a wheel, and no generic name (`harness`, `reference`, ...) is taken from users.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_harness.harness.api import CannotJudge, Judgement, UsageError, check

__version__ = "0.1.0"
__all__ = ["CannotJudge", "Judgement", "UsageError", "check"]


def __getattr__(name: str) -> Any:
    """What is public, imported when it is asked for: the pytest plugin loads this package in everybody's sessions."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moe_harness.harness import api

    return getattr(api, name)
