"""The wheel in a new environment, beside a user's folder whose own modules have the names of this project's folders."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = """
import harness          # a package of theirs
import reference        # a module of theirs
from fixtures import one


def gate(hidden_states, gate_weight, shared_output):
    import suites  # at a call
    return harness.twice((hidden_states @ gate_weight.T).sigmoid() * shared_output) / 2 * one * suites.one


def halved(*tensors):
    return gate(*tensors) / 2
"""
TEST = """
import harness, pytest

pytestmark = pytest.mark.stage("shared_expert_gate")


def test_contract(verdict):
    verdict()


def test_theirs():
    assert harness.twice(2) == 4
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the tree."""
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("wheel")
    left = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A new environment with the wheel; the dependencies are this environment's, and come after its own packages."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    executable = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(executable), "install", "-q", "--no-deps"]
    install += ["--ignore-installed", str(wheel)]  # also where that environment holds the project itself
    done = subprocess.run(install, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return executable


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in {
        "kernel.py": KERNEL, "test_theirs.py": TEST, "reference.py": "", "suites.py": "one = 1",
        "harness/__init__.py": "def twice(x): return x * 2", "fixtures/__init__.py": "one = 1", "impls.py": "1 / 0",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(python, project, program, *arguments):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    command = [str(python.with_name(program)) if program != "pytest" else str(python), *arguments]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=240)


def test_the_wheel_takes_one_name_and_no_test_of_ours(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"moe_harness"}
    assert "moe_harness/py.typed" in names and "moe_harness/suites/experts/test_experts.py" in names
    assert not any(f"/suites/{folder}/" in name for name in names for folder in ("meta", "mutation", "performance"))


@pytest.mark.parametrize(("attribute", "status"), [("gate", 0), ("halved", 1)])
@pytest.mark.parametrize("spec", ["kernel.py", "kernel"])
def test_the_command_judges_a_kernel_beside_them(python, project, spec, attribute, status):
    arguments = ("--stage", "shared_expert_gate", "--impl", f"{spec}:{attribute}", "--check", "numeric,contract")
    done = run(python, project, "moe-harness", "check", *arguments, "--json", "out.json", "--html", "out.html")
    assert done.returncode == status, done.stdout + done.stderr
    result = json.loads((project / "out.json").read_text())
    assert result["coverage"]["executed"] > 50
    if status:
        line = result["failures"][0]["replay"].split()
        assert run(python, project, *line).returncode == 1


def test_pytest_starts_beside_them_with_the_plugin(python, project):
    done = run(python, project, "pytest", "-m", "pytest", "-q", "--impl", "kernel.py:gate")
    assert done.returncode == 0 and "moe-harness" in done.stdout, done.stdout + done.stderr


def test_the_installed_suites_judge_what_impl_names(python, project):
    suite = ("--pyargs", "moe_harness.suites.shared_expert_gate", "-k", "contract", "--impl", "kernel.py:halved")
    done = run(python, project, "pytest", "-m", "pytest", "-q", *suite)
    assert done.returncode == 1 and "moe-harness replay" in done.stdout, done.stdout + done.stderr
