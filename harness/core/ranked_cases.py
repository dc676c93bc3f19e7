"""Fields that the cases of several stages over many ranks have in common, no torch."""

from collections.abc import Sequence

from moe_harness.harness.core.errors import UsageError, unknown

DTYPES = ("fp32", "bf16", "fp16")
LAYOUTS = ("padded", "strided", "transposed", "unit")  # how an operand may lie, other than row behind row


def numbers(text: str) -> list[int]:
    """ "0+2" -> [0, 2]; what a case says once per rank or per expert."""
    try:
        return [int(part) for part in text.split("+")]
    except ValueError:
        raise UsageError(f"{text!r} should be whole numbers joined by '+', such as 0+2") from None


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """UsageError with the nearest names where `value` is not known."""
    if value not in known:
        raise unknown(name, value, list(known))


def laid_out(layout: str, operands: Sequence[str]) -> None:
    """UsageError where the layout of a case is none, "operand:kind"."""
    if layout:
        operand, _, kind = layout.partition(":")
        one_of("layout", operand, operands)
        one_of("layout", kind, LAYOUTS)


def unit_of(dtype: str) -> float:
    """What whole numbers of exact data are multiplied by: in bf16 most of them pass the largest number of fp16."""
    return 2.0**14 if dtype == "bf16" else 1.0
