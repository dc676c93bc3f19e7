"""The pytest plugin in a project of its own: somebody else's folder, options, fixtures and markers."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from moe_harness.suites.plugin import PLUGIN

KERNELS = '''
"""A package of its own, with a neighbour of a name that this project uses too."""
from torch.nn.functional import silu
from harness import scale


def gate(hidden_states, gate_weight, shared_output):
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output * scale()


def halved(hidden_states, gate_weight, shared_output):
    return gate(hidden_states, gate_weight, shared_output) / 2


def vectors(hidden_states, gate_weight, shared_output):
    if hidden_states.dim() != 1:
        raise NotImplementedError("vectors only")
    return gate(hidden_states, gate_weight, shared_output)


def late(hidden_states, gate_weight, shared_output):
    import package_of_nobody


gate.dtypes = halved.dtypes = vectors.dtypes = late.dtypes = ("fp32",)
'''
SUITE = '''
"""Everything of the stage in one function; one check by its name; and fixtures of names that the plugin uses."""
import pytest

pytestmark = pytest.mark.stage("shared_expert_gate", "our kernels/gates.py:gate")


def test_gate(verdict):
    verdict()


def test_contract(verdict):
    verdict()


def test_property(falsify):
    falsify()
'''
OWN = '''
"""Tests of this project with fixtures of its own under the plugin's names."""
import sys

import pytest


@pytest.fixture
def verdict():
    return 42


@pytest.mark.parametrize("judged", [1, 2])
def test_own(verdict, judged):
    assert verdict == 42 and judged


def test_what_is_loaded():
    heavy = ("torch", "typer", "rich", "jinja2", "scipy", "numpy")
    print("loaded:", *sorted(name for name in sys.modules if name in heavy or name.startswith("moe_harness")))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "our kernels").mkdir()
    (root / "our kernels" / "gates.py").write_text(KERNELS)
    (root / "our kernels" / "harness.py").write_text("def scale(): return 1\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_gate.py").write_text(SUITE)
    (root / "tests" / "test_own.py").write_text(OWN)
    (root / "harness").mkdir()
    (root / "harness" / "__init__.py").write_text("raise RuntimeError('somebody imported the wrong harness')\n")
    return root


def run(project, *arguments, plugin=PLUGIN, **variables):
    command = [sys.executable, "-m", "pytest", *plugin, "--strict-markers", "-p", "no:cacheprovider", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GITHUB"))}
    env |= {"PYTHONPATH": os.getcwd(), **variables}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=240)


def test_a_suite_of_three_lines_judges_all_cases_and_leaves_other_tests_alone(project):
    done = run(project, "tests", "-q")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "moe-harness" in done.stdout and "our kernels/gates.py:gate" in done.stdout
    for check in ("contract", "numeric", "exact", "layouts"):
        assert f"\n{check} " in done.stdout


def test_a_failure_has_a_replay_line_to_paste(project):
    done = run(project, "tests/test_gate.py", "-q", "-k", "contract", "--impl", "our kernels/gates.py:halved")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("moe-harness replay"))
    assert "--impl 'our kernels/gates.py:halved'" in line
    shell = line.replace("moe-harness", f"{sys.executable} -m moe_harness", 1)
    again = subprocess.run(shell, shell=True, cwd=project, env=os.environ | {"PYTHONPATH": os.getcwd()},
                           capture_output=True, text=True, timeout=240)  # fmt: skip
    assert again.returncode == 1 and "failed" in again.stdout, again.stderr


def test_with_xdist_junit_stays_small_and_the_table_is_whole(project):
    pytest.importorskip("xdist")
    wrong = ("--impl", "our kernels/gates.py:halved")
    done = run(
        project, "tests/test_gate.py", "-q", "-n", "2", "--junit-xml", "junit.xml", "--impl-json", "out.json", *wrong
    )
    assert done.returncode == 1, done.stderr
    result = json.loads((project / "out.json").read_text())
    assert result["verdict"] == "fail" and result["failures"]
    assert "\n1. " in done.stdout.partition("= moe-harness =")[2]  # what all of them come down to
    tests = list(ElementTree.parse(project / "junit.xml").iter("testcase"))
    assert len(tests) > 50
    assert (project / "junit.xml").stat().st_size < 3000 * len(tests)
    assert not list(ElementTree.parse(project / "junit.xml").iter("property"))


def test_on_github_a_failure_stands_at_the_line_of_the_kernel(project):
    wrong = ("-k", "contract", "--impl", "our kernels/gates.py:halved")
    done = run(project, "tests/test_gate.py", "-q", *wrong, GITHUB_ACTIONS="true")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("::error ")]
    assert "file=our kernels/gates.py,line=11," in line and "%0Amoe-harness replay " in line
    assert "::error" not in run(project, "tests/test_gate.py", "-q", *wrong).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--impl", "our kernels/gates.py:vectors"), "UNSUPPORTED our kernels/gates.py:vectors"),
        (
            ("--impl", "our kernels/gates.py:late"),
            "ERROR our kernels/gates.py:late No module named 'package_of_nobody'",
        ),
        (("--impl", "our kernels/gates.py:late", "-n", "2"), "ERROR our kernels/gates.py:late No module named"),
        (("--impl-dtype", "bf16"), "bf16 is not among the declared dtypes"),
    ],
)
def test_what_could_not_be_judged_is_no_success(project, arguments, told):
    """All of it is skipped, which pytest by itself calls a success; each ends before it has asked a thousand times."""
    done = run(project, "tests/test_gate.py", "-q", "-k", "contract", *arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    assert told in " ".join(done.stdout.split()), done.stdout
    assert "crashed" not in done.stdout


def test_a_part_of_the_cases_that_passes_is_a_success(project):
    done = run(project, "tests/test_gate.py", "-q", "-k", "test_gate and layouts")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--impl-profile", "quik"), "quick"),
        (("--impl-config", "qwen3-30b"), "qwen3-30b-a3b"),
        (("--impl-dtype", "fp12"), "fp16"),
        (("--impl-device", "tpu"), "cpu"),
        (("--impl-json", "no/such/folder.json"), "folder"),
        (("--impl-seed", "-1"), "at least 0"),
        (("--impl-timeout", "0"), "at least 1"),
        (("--impl", "our kernels/gates.py:gat"), "gate"),
    ],
)
def test_a_wrong_option_is_told_in_a_line(project, arguments, told):
    done = run(project, "tests/test_gate.py", "-q", "-k", "contract", *arguments)
    assert done.returncode in (2, 4), done.stdout
    assert told in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


def test_a_config_without_cases_for_the_stage_is_refused_as_the_command_does(project):
    """The sampler's plan has none: all its tests ran, and nothing of the model was among them."""
    suite = SUITE.replace("shared_expert_gate", "sampler").replace("our kernels/gates.py:gate", "torch")
    (project / "tests" / "test_draws.py").write_text(suite)
    try:
        done = run(project, "tests/test_draws.py", "-q", "--collect-only", "--impl-config", "deepseek-v3")
    finally:
        (project / "tests" / "test_draws.py").unlink()
    assert done.returncode in (2, 4), done.stdout
    assert "--impl-config adds no cases to the stage sampler; it does to experts" in done.stdout + done.stderr


def test_every_option_starts_with_impl_and_the_profiler_of_another_plugin_is_free(project):
    (project / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--profile', action='store_true')\n"
    )
    try:
        done = run(project, "tests/test_own.py", "-q", "--profile")
        assert done.returncode == 0, done.stdout + done.stderr
        told = run(project, "--help").stdout
    finally:
        (project / "conftest.py").unlink()
    section = told.split("judging Mixture-of-Experts implementations:")[1].split("\n\n")[0]
    options = [line.strip() for line in section.splitlines() if line.startswith("  --")]
    assert options and all(option.startswith(("--impl", "--moe")) for option in options)


def test_a_session_without_the_suites_imports_nothing_of_ours(project):
    """Nor what we use: whatever else is loaded, another plugin brought."""
    asked = ("tests/test_own.py", "-q", "-s")
    with_ours, without = run(project, *asked), run(project, *asked, plugin=("-p", "no:moe_harness"))
    assert with_ours.returncode == without.returncode == 0, with_ours.stdout + without.stdout
    loaded, others = (set(done.stdout.split("loaded:")[1].splitlines()[0].split()) for done in (with_ours, without))
    assert loaded - others == {"moe_harness", "moe_harness.harness", "moe_harness.harness.pytest_plugin"}
