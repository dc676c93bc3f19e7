"""Settings of every pytest run in this tree: Hypothesis profiles, and markers that skip what cannot run and say why."""

import ctypes
import os
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

MARKERS = (
    "gpu: needs one CUDA device",
    "multigpu(n=2): needs n CUDA devices of one host",
    "accuracy: needs lm-eval, a model and hours; run by the tox environment of that name",
    "nightly: too slow for every change; runs where the Hypothesis profile is nightly",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and load the Hypothesis profile that HYPOTHESIS_PROFILE names (ci unless set)."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not has_cuda_driver():  # read when Triton is imported, so set before anything imports it
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # A test must give the same verdict on every machine, so ci draws the same examples each time and keeps no database.
    settings.register_profile(
        "ci", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile(
        "nightly", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile(hypothesis_profile())


def hypothesis_profile() -> str:
    """Name of the Hypothesis profile of this run."""
    return os.environ.get("HYPOTHESIS_PROFILE", "ci")


def has_cuda_driver() -> bool:
    """Whether Triton kernels may find a GPU; without, their tests run under Triton's interpreter."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def cuda_devices() -> int:
    """CUDA devices that torch can use; torch is imported here, not at the top, for the runs that never ask."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def missing(item: pytest.Item) -> str | None:
    """What the item needs and this machine lacks, in words, or None."""
    if (marker := item.get_closest_marker("multigpu")) is not None:
        wanted = marker.kwargs.get("n", marker.args[0] if marker.args else 2)
        if (found := cuda_devices()) < wanted:
            return f"needs {wanted} CUDA devices, this machine has {found}"
    if item.get_closest_marker("gpu") is not None and cuda_devices() == 0:
        return "needs a CUDA device, this machine has none"
    if item.get_closest_marker("accuracy") is not None and find_spec("lm_eval") is None:
        return "needs lm-eval, which is not installed (pip install 'moe-harness[eval]')"
    if item.get_closest_marker("nightly") is not None and hypothesis_profile() != "nightly":
        return "runs at night only (HYPOTHESIS_PROFILE=nightly)"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if (reason := missing(item)) is not None:
        pytest.skip(reason)
