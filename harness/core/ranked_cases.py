"""Fields that the cases of several stages over many ranks have in common, no torch."""

from collections.abc import Sequence

from moe_harness.harness.core.errors import UsageError, unknown

DTYPES = ("fp32", "bf16", "fp16")


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
