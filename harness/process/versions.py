"""What a judgement ran with, for its report."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version


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
