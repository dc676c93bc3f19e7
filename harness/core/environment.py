"""What is missing on this machine, in words that lead to it: packages, a device for Triton, versions that fit."""

import os
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version

# The extra of this project that brings a package; of others only the package itself can be named.
EXTRAS = {
    "transformers": "transformers", "safetensors": "transformers",
    "triton": "gpu", "liger_kernel": "gpu", "matplotlib": "gpu", "lm_eval": "eval",
}  # fmt: skip


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """The line that installs what could not be found; None where it is part of something that is installed."""
    package = (error.name or "").partition(".")[0]
    if not package or package in sys.modules or package == "moe_harness":
        return None
    if package in EXTRAS:
        return f"pip install 'moe-harness[{EXTRAS[package]}]' brings it"
    return f"{package} is not installed here and no module of that name lies beside the implementation"


def what_is_missing(error: BaseException) -> str | None:
    """Why a call failed through no fault of its own: a package that is not there, a GPU that Triton did not find."""
    if isinstance(error, ModuleNotFoundError):
        advice = how_to_install(error)
        return advice and f"{error}: {advice}"
    if "active drivers" in str(error) and "triton" in sys.modules and not _interpreting():
        return (
            "its Triton kernels found no GPU. Set TRITON_INTERPRET=1 to judge them on the CPU in Triton's interpreter "
            "(TRITON_INTERPRET=1 moe-harness check ...), or use --device cuda on a machine that has one"
        )
    if _interpreting() and _raised_in(error, "triton/runtime/interpreter.py", "only 0-dimensional arrays"):
        found = f"Triton {version('triton')} does not go with NumPy {version('numpy')}"
        return f"the interpreter of {found}: pip install 'numpy<2.4', or a newer triton"
    return None


def _raised_in(error: BaseException, file: str, words: str) -> bool:
    """Whether what first went wrong said `words` in `file`.

    Triton 3.6's interpreter makes a number of an array of one element, as in `for i in range(loaded, end)`, which NumPy
    refuses from 2.4 on.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    return words in str(error) and bool(frames) and frames[-1].filename.endswith(file)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def versions() -> dict[str, str | None]:
    """Versions by distribution name (None where it is not installed), the device in use, Python and the platform."""
    found: dict[str, str | None] = {}
    for name in ("moe-harness", "torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    torch = sys.modules.get("torch")  # the controller has none, and its report needs none
    if torch is not None and torch.cuda.is_initialized():
        found["device"] = torch.cuda.get_device_name()
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
