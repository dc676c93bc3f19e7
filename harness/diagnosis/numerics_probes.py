r"""How an implementation computes: which values it stores in the inputs' dtype, and how it accumulates.

Every probe is exact but for the one step it asks about.  With P = 2^8 (bf16) or 2^11 (fp16), P + 1 is the first integer
the dtype cannot hold, so 3 (P + 1) = 3 P + 3 reads as
    3 P        where P + 1 was stored before it was multiplied
    3 P + 4    where the product was stored
    3 P + 3    where neither was
and subtracting 3 P makes that the result.  An accumulator of p bits loses a 1 next to 2^p: L, 1, -L sum to 0 in it.
Where two ones beside each other survive and one alone does not, both were added before they met L: in one block.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.registry import stage_part
from moe_harness.harness.diagnosis.probing import BITS, FIRST, TERMS, Sum

FORMATS = {8: "bf16", 11: "fp16 or tf32", 24: "fp32", 53: "fp64"}
WIDEST = 27  # bits told apart in an accumulator


def how_it_computes(trial: Trial) -> str:
    """A paragraph on how the implementation rounds and accumulates; only what the probes establish."""
    probes = trial.stage.part("probes")
    if probes is None:
        return ""
    of_dtype = getattr(probes, "sentences", _of_dtype)
    declared = trial.subject.declared.dtypes
    told: dict[str, list[str]] = {}
    for name in (n for n in ("bf16", "fp16", "fp32") if n in declared):
        sentences = of_dtype(trial, name)
        told.setdefault("; ".join(sentences), []).append(name)
    return " ".join(f"In {_listed(names)} it {sentences}." for sentences, names in told.items() if sentences)


def stores(trial: Trial, dtype: str) -> dict[str, bool]:
    """For each value that the stage's probes could decide on: is it stored in `dtype`?"""
    probe = None if dtype == "fp32" else getattr(trial.stage.part("probes"), "stores", None)
    return probe(trial, dtype) if probe else {}


def accumulators(trial: Trial, dtype: str) -> dict[str, dict[str, Any]]:
    """For each product: `bits` of its accumulator (None: more than can be told), `block`: terms summed beforehand."""
    found = {}
    for name, sums in products(trial, dtype).items():
        bits = _width(sums)
        if bits is not None:
            found[name] = {"bits": bits if bits <= WIDEST else None, "block": _block(sums, bits)}
    return found


def products(trial: Trial, dtype: str) -> dict[str, Sum]:
    """The sums that the probes of the stage can see, by what they are of."""
    probe = getattr(trial.stage.part("probes"), "products", None)
    return probe(trial, dtype) if probe else {}


def sees_sums(stage: str) -> bool:
    """Whether the probes of a stage can see how its products are summed."""
    return hasattr(stage_part(stage, "probes"), "products")


def slot_sum_bits(trial: Trial, dtype: str) -> int | None:
    """Bits of the sum over a token's slots where a narrow format holds it, 8 or 11; None for a wider one, or none."""
    probe = getattr(trial.stage.part("probes"), "slot_sum_bits", None)
    return probe(trial, dtype) if probe else None


def operand_bits(trial: Trial) -> int | None:
    """Bits of the significand that fp32 operands keep in the products: 24, 11 for tf32, 8 for bf16."""
    if getattr(trial.stage.part("probes"), "HIDES_OPERANDS", False):
        return None
    sums = next(iter(products(trial, "fp32").values()))
    kept = torch.arange(1, 24)
    rows = torch.zeros(len(kept), TERMS)
    rows[:, 1], rows[:, 2] = 1 + 2.0**-kept, -1.0
    got = sums(rows)
    if got is None or not _is_kept_or_lost(got, 2.0**-kept):
        return None
    survived = got == 2.0**-kept
    return 24 if bool(survived.all()) else int(survived.int().argmin()) + 1


# ----------------------------------------------------------------------------------------------------------- words


def _of_dtype(trial: Trial, name: str) -> list[str]:
    told = _of_stores(stores(trial, name))
    sums = {product: _sum_in_words(**found) for product, found in accumulators(trial, name).items()}
    if len(set(sums.values())) == 1:
        sums = {"the products" if len(sums) > 1 else "the product": next(iter(sums.values()))}
    told += [f"accumulates {product} in {words}" for product, words in sums.items()]
    if name == "fp32":
        bits = operand_bits(trial)
        if bits is not None and bits < 24:
            told.append(f"rounds the operands of products to {bits} bits ({FORMATS.get(bits, 'an unusual format')})")
    bits = slot_sum_bits(trial, name)
    if bits is not None and bits < BITS[name]:
        told.append(f"sums the slots of a token in {_sum_in_words(bits, None)}")
    order = getattr(trial.stage.part("probes"), "order", None)
    return told + [words for words in [order(trial, name) if order else ""] if words]


def _of_stores(found: dict[str, bool]) -> list[str]:
    words = {
        "gate_up": "gate and up",
        "activation": "the activation",
        "expert_output": "each expert's output",
        "weighted": "each weighted output",
        "partial_sum": "the running sum over the slots",
        "routing_weight": "the routing weights",
        "logit": "the logit",
        "gate": "the gate",
    }
    stored = [words[n] for n, yes in found.items() if yes]
    kept = [words[n] for n, yes in found.items() if not yes]
    told = [f"stores {_listed(stored)} in the inputs' dtype"] if stored else []
    if found and not stored:
        return ["stores no intermediate value in the inputs' dtype"]
    return told + ([f"keeps {_listed(kept)} wider"] if kept else [])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sum_in_words(bits: int | None, block: int | None) -> str:
    if bits is None:
        return f"more than {WIDEST} bits, or in an order in which none are lost"
    told = f"{FORMATS[bits]} ({bits} bits)" if bits in FORMATS else f"{bits} bits"
    if block is None:
        return told
    return f"{told}, no neighbouring terms beforehand" if block == 1 else f"{told}, {block} terms at a time"


# ---------------------------------------------------------------------------------------------------- accumulation


def _width(sums: Sum) -> int | None:
    """The smallest j at which a 1 beside 2^j is lost, wherever the 1 and -2^j stand; WIDEST + 1 where none is.

    None where a result is no such sum at all, or where 2^j leaves the accumulator's range before anything is lost.
    """
    exponents, last, half = torch.arange(FIRST, WIDEST + 1), TERMS - 1, TERMS // 2
    places = ((1, last), (half, last), (last - 1, last), (1, 2), (2, 17), (5, 3), (77, 200))
    rows = torch.zeros(len(exponents), len(places), TERMS)
    for number, (one, minus) in enumerate(places):
        rows[:, number, 0], rows[:, number, minus] = 2.0**exponents, -(2.0**exponents)
        rows[:, number, one] = 1.0
    got = sums(rows.flatten(0, 1))
    if got is None or not _is_kept_or_lost(got, 1.0) or not bool((got[: len(places)] == 1).all()):
        return None
    wrong = ((got != 1) & got.isfinite()).view(len(exponents), -1).any(1).nonzero()
    if not len(wrong):
        return WIDEST + 1 if bool(got.isfinite().all()) else None
    return FIRST + int(wrong[0])


def _is_kept_or_lost(got: Tensor, small: Tensor | float) -> bool:
    """Whether each finite sum holds `small` entire, not at all, or rounded up to twice of it."""
    return bool(((got == 0) | (got == small) | (got == 2 * small) | ~got.isfinite()).all())


def _block(sums: Sum, bits: int) -> int | None:
    """How many neighbouring terms are summed before they meet the rest; None where the pattern is no such thing."""
    if bits > WIDEST:
        return None
    pairs = torch.arange(1, TERMS - 2)
    rows = torch.zeros(len(pairs), TERMS)
    rows[:, 0], rows[:, -1] = 2.0**bits, -(2.0**bits)
    rows.scatter_(1, pairs[:, None], 1.0).scatter_(1, pairs[:, None] + 1, 1.0)
    got = sums(rows)
    if got is None:
        return None
    apart = (got == 0).nonzero()[:, 0] + 2  # index of the second one of a pair that did not survive
    if len(apart) == len(pairs):
        return 1
    together = (got != 0).nonzero()[:, 0] + 2
    borders = [int(i) for i in apart if int(together[0]) < int(i) < int(together[-1])]
    steps = {b - a for a, b in zip(borders, borders[1:], strict=False)}
    regular = len(steps) == 1 and borders[0] % min(steps) == 0
    return min(steps) if regular else None
