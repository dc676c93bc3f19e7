"""Whose is an exception: the author's, whose code is judged; torch's; the judge's; or the machine's own trouble?

Code under judgement is entered through `hand_over` alone.  What is raised beyond that point is the author's, unless
the last frame outside torch belongs to the judge (the recorder that an implementation's collectives pass through); what
is raised with no such point behind it is the judge's.  An error of the judge and a full disk are never a finding, and
never a refusal: they end the case with exit status 3.
"""

import dis
import errno
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_harness.harness.core.errors import CannotJudge

HARNESS = os.path.dirname(os.path.dirname(__file__)) + os.sep
FAULTS = f"{os.sep}faults{os.sep}"  # those of the catalogue are judged like anybody's code, with what they call
STANDARD = sysconfig.get_path("stdlib") + os.sep
# What no implementation can help: a full disk, a table of the system that is full, a port that is taken.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.ENFILE, errno.EIO, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EROFS)
# Python's own words for a call that went wrong.  A keyword that a library does not know is none: it may be an old one.
OF_PYTHON = (
    "object is not", "is not in list", "x not in list", "not in deque", "tuple.index(x)", "not enough values to unpack",
    "too many values to unpack", "positional argument", "unsupported operand type", "invalid literal for",
    "could not convert string", "cannot convert float", "math domain error", "arg is an empty sequence",
    "argument is empty", "zip() argument", "must not be zero", "negative shift count", "substring not found",
    "object cannot be interpreted as", "invalid combination of arguments", "unhashable type", "has no len()",
    "sequence item", "must be Tensor, not", "expected Tensor as element", "could not be broadcast",
    "could not broadcast", "cannot reshape array", "input array dimensions", "all input arrays must have",
)  # fmt: skip
TEXTS = tuple(os.strerror(number) for number in MACHINE)  # C++ tells the same in words


def hand_over(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call code under judgement; nothing else may be called through here."""
    return function(*arguments, **keywords)


def pass_on(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call, for code under judgement, what it has called itself: what fails in there is none of the judge's."""
    return function(*arguments, **keywords)


def is_judges(error: BaseException) -> bool:
    """Whether the judge itself failed, alone or underneath code under judgement."""
    if left_behind(error):
        return False
    beyond = _beyond(error)
    if beyond is None:
        return True
    told = [frame.filename for frame in beyond if not _is_library(frame.filename)]
    return bool(told) and _is_harness(told[-1]) and not any(FAULTS in name for name in told)


def left_behind(error: BaseException) -> bool:
    """Whether it was told only after code under judgement had returned: by the device, waited for or used again."""
    return _crossing(error) == "pass_on"


def machine_trouble(error: BaseException) -> str | None:
    """What the machine lacks, in words, where that is what `error` tells of."""
    if isinstance(error, OSError) and error.errno in MACHINE:
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno == errno.EMFILE and is_judges(error):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in TEXTS):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def own_refusal(error: BaseException) -> bool:
    """Whether the author refuses: by a `raise` of their own code or library, not by an accident or by torch.

    NotImplementedError says so by itself, except out of torch.distributed, which the harness has set up.
    """
    if _crossing(error) == "pass_on":
        return False
    frames = _beyond(error) or []
    last = frames[-1] if frames else None
    if last is None:
        return True
    if isinstance(error, NotImplementedError):
        return not last.filename.startswith(os.path.join(_torch_folder(), "distributed"))
    return not last.filename.startswith(_torch_folder()) and (not last.line or last.line.startswith("raise"))


def accident(error: BaseException) -> bool:
    """Whether an exception with which inputs are refused was raised by no decision of the author for certain.

    Python raises it for an operator, an unpacking, an index, or says so in words of its own; or torch's Python code
    does.  What a compiled function raises may be its author's refusal (TORCH_CHECK_VALUE), and is no accident.
    """
    frames, trace = _beyond(error) or [], error.__traceback__
    if not frames or trace is None or isinstance(error, NotImplementedError) or own_refusal(error):
        return False
    if frames[-1].filename.startswith(_torch_folder()):
        return bool(frames[-1].line and frames[-1].line.startswith("raise"))
    while trace.tb_next is not None:
        trace = trace.tb_next
    made = next((i.opname for i in dis.get_instructions(trace.tb_frame.f_code) if i.offset == trace.tb_lasti), "CALL")
    return "CALL" not in made or any(words in str(error) for words in OF_PYTHON)


def place(error: BaseException) -> str:
    """file:line in function of the author's innermost frame, or of the innermost at all."""
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [
        frame for frame in _beyond(error) or [] if not _is_library(frame.filename) and not _is_harness(frame.filename)
    ]
    if not frames:
        return "(nowhere)"
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


@contextmanager
def judging() -> Iterator[None]:
    """What fails in here for lack of something that the machine should have is a CannotJudge that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = machine_trouble(error)
        if told is None:
            raise
        raise CannotJudge(out_of(told)) from error


def out_of(told: str) -> str:
    """The message for what the machine lacks."""
    folder = os.environ.get("TMPDIR", "/tmp")
    return (
        f"this machine failed, not the implementation: {told}\n"
        f"  free disk space, file handles or ports, and run again; temporary files are in {folder} (set TMPDIR)"
    )


def _beyond(error: BaseException) -> list[traceback.FrameSummary] | None:
    """The frames beyond the last `hand_over`; None where there is none."""
    frames = list(traceback.extract_tb(error.__traceback__))
    entries = [i for i, frame in enumerate(frames) if frame.name == "hand_over" and frame.filename == __file__]
    return frames[entries[-1] + 1 :] if entries else None


def _crossing(error: BaseException) -> str:
    """The last border that was crossed on the way to the error: "hand_over", "pass_on" or none."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
    return next((name for name in reversed(names) if name in ("hand_over", "pass_on")), "")


def _is_harness(filename: str) -> bool:
    return filename.startswith(HARNESS) and FAULTS not in filename


def _is_library(filename: str) -> bool:
    is_standard = filename.startswith(STANDARD) and "site-packages" not in filename
    return filename.startswith((_torch_folder(), "<")) or is_standard


def _torch_folder() -> str:
    import torch

    return os.path.dirname(torch.__file__) + os.sep


@contextmanager
def kept_defaults() -> Iterator[None]:
    """Put back torch's default dtype and device, number of threads, grad mode and determinism as they are now."""
    import torch  # not where a run is controlled

    dtype, device, grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
