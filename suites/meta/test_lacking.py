"""What a machine lacks, be it a package or a device, is no failure of a kernel: exit status 3, and what to install."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest
import torch

from moe_harness.harness.core import environment
from moe_harness.harness.core.environment import EXTRAS
from moe_harness.suites.command import run, run_apart

ROOT = Path(__file__).resolve().parents[2]

TRITON = """
import torch, triton
import triton.language as tl

@triton.jit
def copy(x, out, n: tl.constexpr):
    tl.store(out + tl.arange(0, n), tl.load(x + tl.arange(0, n)))

def gate(hidden_states, gate_weight, shared_output):
    out = torch.empty(16)
    copy[(1,)](torch.ones(16), out, 16)
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output * out[0]
"""
MISSING = """
def late(hidden_states, gate_weight, shared_output):
    import {package}
"""


def test_what_this_machine_lacks_is_no_failure_of_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "kernel.py").write_text(TRITON)
    (tmp_path / "early.py").write_text(
        "import package_of_nobody\n\ndef late(hidden_states, gate_weight, shared_output): ..."
    )
    for package in ("package_of_nobody", "liger_kernel.nothing"):
        (tmp_path / f"{package[:5]}.py").write_text(MISSING.format(package=package))
    told = {"early.py:late": "package_of_nobody", "packa.py:late": "package_of_nobody"}
    if importlib.util.find_spec("liger_kernel") is None:
        told["liger.py:late"] = "pip install 'moe-harness[gpu]'"
    if not torch.cuda.is_available():
        told["kernel.py:gate"] = "Set TRITON_INTERPRET=1"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for spec, words in told.items():
        done = run(tmp_path, "check", "--stage", "shared_expert_gate", "--impl", spec, "--check", "contract")
        assert done.returncode == 3, done.stdout
        assert words in " ".join((done.stdout + done.stderr).split())


def test_what_every_case_needs_is_told_by_the_first(tmp_path):
    """What is imported inside a call is found missing by each of a thousand cases, but one of them says it all."""
    body = "open('calls', 'a').write('1'); import package_of_nobody"
    (tmp_path / "kernel.py").write_text(f"def late(x, weight, group_sizes, *, bias=None):\n    {body}\n")
    done = run(tmp_path, "check", "--stage", "grouped_linear", "--impl", "kernel.py:late", "--json", "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 3 and result["verdict"] == "error" and not result["clusters"]
    assert len((tmp_path / "calls").read_text()) < 10
    assert all(check["skipped"] == check["cases"] for check in result["checks"])
    assert " ".join(done.stdout.split()).count("package_of_nobody") <= 4


def test_what_the_judge_itself_lacks_is_told_like_what_a_kernel_lacks(tmp_path):
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").write_text("raise ModuleNotFoundError('gone', name='safetensors')")
    done = run_apart(tmp_path, "check", "--stage", "model", "--impl", "qwen3_moe", "--check", "contract")
    assert done.returncode == 3 and "Traceback" not in done.stdout, done.stdout
    assert "pip install 'moe-harness[transformers]'" in " ".join(done.stdout.split())


def test_every_extra_that_is_named_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        assert any(package.replace("_", "-") in line for line in project["optional-dependencies"][extra])


@pytest.mark.parametrize(
    ("file", "found"), [("/lib/triton/runtime/interpreter.py", True), ("/home/me/kernel.py", False)]
)
def test_a_numpy_that_is_too_new_for_tritons_interpreter_is_no_failure(file, found, monkeypatch):
    """As Triton 3.6 fails with `for i in range(loaded, end)`; the same words of the kernel itself are its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(environment, "version", {"triton": "3.6.0", "numpy": "2.4.6"}.__getitem__)
    older = "raise TypeError('only 0-dimensional arrays can be converted to Python scalars')"
    with pytest.raises(RuntimeError) as raised:
        try:
            exec(compile(older, file, "exec"))  # noqa: S102
        except TypeError as error:
            raise RuntimeError(repr(error)) from error
    told = environment.what_is_missing(raised.value)
    assert (told is not None and "pip install 'numpy<2.4'" in told) == found
