"""Finds an implementation by its spec in a worker; the class is kept, so that a case costs no import."""

import functools
from typing import Any

from harness import contracts


@functools.cache
def load(stage: str, spec: str) -> Any:
    """The attribute that `spec` names (registered name, module:attribute or file.py:attribute).

    Raises:
        UsageError: no such name, file or attribute.
        CannotJudge: the module fails while it is imported.
    """
    return contracts.find(stage, spec)
