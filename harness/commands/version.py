"""What `moe-harness --version` prints, read from the installed packages' metadata: nothing is imported for it."""

import platform
from importlib import metadata

import moe_harness

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest")


def version_lines() -> list[str]:
    """This project's version first, then Python's and those of the packages that a verdict may depend on."""
    lines = [f"moe-harness {moe_harness.__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return lines
