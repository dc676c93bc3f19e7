"""What goes wrong around a judgement, as opposed to inside it: messages for the caller and their exit status."""

from difflib import get_close_matches

EXIT_PASS, EXIT_FAIL, EXIT_USAGE, EXIT_CANNOT_JUDGE = 0, 1, 2, 3


class HarnessError(Exception):
    """Ends a command with a message of a few lines: what was got, what was wanted, what to do."""

    exit_status = EXIT_CANNOT_JUDGE

    def __reduce__(self):  # pickled with its message only, so that it crosses process borders unchanged
        return type(self), (str(self),)


class UsageError(HarnessError):
    """The call is wrong: unknown name, bad option, a function with another signature."""

    exit_status = EXIT_USAGE


class CannotJudge(HarnessError):
    """The call is right but nothing can be judged: import error in the user's file, hardware absent."""


class Lacks(CannotJudge):
    """A package or a device that every other case needs as well is not on this machine."""


def unknown(kind: str, got: str, wanted: list[str]) -> UsageError:
    """The message for a name that does not exist, with the nearest names that do."""
    near = get_close_matches(got, wanted, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(repr(n) for n in near)}?"
        if near
        else f"known: {', '.join(sorted(set(wanted))) or '-'}"
    )
    return UsageError(f"{kind} {got!r} does not exist; {hint}")
