"""Arguments in another order than the contract's, told from the names of an implementation's parameters; no torch."""

import inspect
import re
from collections.abc import Sequence

# What people call them; only where the names of both places say so.
IDS = re.compile(r"(^|_)(ids?|idx|indexes|indices|selected)(_|$)", re.IGNORECASE)
WEIGHTS = re.compile(r"(^|_)(weights?|probs?|probabilit\w*|scores?)(_|$)", re.IGNORECASE)
PAIR = ("topk_weights", "topk_ids")


def swapped(wanted: Sequence[str], signature: inspect.Signature) -> tuple[str, int, int] | None:
    """(a parameter, the place where the contract's call hands that argument over, its own place), from 1; or None.

    A parameter with the contract's own name in another place is one, and so are `expert_ids, expert_weights` for
    `topk_weights, topk_ids`.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds][: len(wanted)]
    for place, name in enumerate(names):
        if name in wanted and wanted.index(name) != place:
            return name, wanted.index(name) + 1, place + 1
    if all(name in wanted for name in PAIR) and len(names) == len(wanted):
        weights, ids = (wanted.index(name) for name in PAIR)
        if IDS.search(names[weights]) and WEIGHTS.search(names[ids]) and not WEIGHTS.search(names[weights]):
            return names[ids], weights + 1, ids + 1
    return None


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th: there are never more than ten arguments."""
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"
