"""What the adapters of other projects' kernels share: the package itself, and refusals of what its kernels do not take.

An adapter hands the contract's arguments over under the names, dtypes and layouts of the library, and refuses what the
library has no argument for: a wrong answer to a question that a kernel was never meant for says nothing about it.
"""

import importlib
from typing import Any

import torch
from torch import Tensor


def needed(module: str, attribute: str, install: str) -> Any:
    """`attribute` of a library's `module`.

    Raises:
        NotImplementedError: the package, or this part of it, is not there; the message holds the line that installs it.
    """
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"needs {attribute} of {module}, which is not here ({error}): {install}") from error


def refuse(library: str, **unwanted: object) -> None:
    """NotImplementedError for the first argument, by name, that is neither None nor False."""
    for name, value in unwanted.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{library} takes no {name.replace('_', ' ')}")


def no_masked_slot(library: str, ids: Tensor) -> None:
    """Refuse ids of -1, for kernels that index with every id.

    Nothing can be asked of a stream that is being captured; whoever captures has called before.
    """
    capturing = ids.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and ids.numel() and bool((ids < 0).any()):
        raise NotImplementedError(f"{library} indexes with every id: it takes no masked slot (-1)")
