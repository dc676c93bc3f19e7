"""Settings of every pytest run in this tree: Hypothesis profiles, and markers that skip what cannot run and say why."""

import ctypes
import os
from collections.abc import Generator
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from moe_harness.suites.outcome_log import OutcomeLog

MARKERS = (
    "gpu: needs one CUDA device",
    "multigpu(n=2): needs n CUDA devices of one host",
    "accuracy: needs lm-eval; run by the tox environment of that name",
    "nightly: too slow for every change; runs where the Hypothesis profile is nightly",
)
REPORTS = pytest.StashKey[list[pytest.TestReport]]()
LEDGER = pytest.StashKey[OutcomeLog]()


@pytest.hookimpl(optionalhook=True)  # without xdist, as the mutation run is, nobody knows it
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """-n auto: half as many workers again as processors, since tests over ranks wait for each other, not for a core."""
    return 3 * len(os.sched_getaffinity(0)) // 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """--ledger FILE; `python -m moe_harness.suites.outcome_log FILE` then tells what is missing."""
    parser.addoption("--ledger", type=Path, help="write each test's outcome here as it comes")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What will run is written down before it does."""
    path = session.config.getoption("--ledger")
    if path is not None and not session.config.option.collectonly:
        session.config.stash[LEDGER] = OutcomeLog(path, [item.nodeid for item in session.items])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """One line for each test, whichever of its phases ended it."""
    reports: list[pytest.TestReport] = item.stash.setdefault(REPORTS, [])
    result = yield
    if (ledger := item.config.stash.get(LEDGER, None)) is not None:
        last = next((report for report in reports if report.outcome != "passed"), reports[-1])
        ledger.add(item.nodeid, last.outcome, sum(report.duration for report in reports), str(last.longrepr or ""))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what each phase came to."""
    report = yield
    item.stash.setdefault(REPORTS, []).append(report)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that was interrupted or stopped early has no end."""
    if (ledger := session.config.stash.get(LEDGER, None)) is not None and exitstatus in (0, 1):
        ledger.finish()


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
    if hypothesis_profile() == "nightly" and getattr(config.option, "impl_seed", None) == 0:
        config.option.impl_seed = int(f"{date.today():%Y%m%d}")  # the data and searches of the stages too


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
