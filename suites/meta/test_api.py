"""The judge in Python: function objects of a module, a script, another function and a notebook, and what comes back."""

import os
import subprocess
import sys
import threading

import pytest

from moe_harness import CannotJudge, UsageError, check
from moe_harness.harness.core.functions import spec_of

LOCK = threading.Lock()
QUICK = {"dtypes": "fp32", "checks": "contract", "quiet": True}


def gate(hidden_states, gate_weight, shared_output):
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a run keeps is kept in the current folder."""
    monkeypatch.chdir(tmp_path)


def test_a_function_of_a_module_is_named_and_passes():
    assert spec_of(gate) == f"{__name__}:gate"
    judged = check(gate, "shared_expert_gate", **QUICK).raise_if_failed()
    assert judged.passed and judged.verdict == "pass" and not judged.failures
    assert "pass of" in repr(judged) and "PASS" in str(judged)


def test_a_function_of_another_function_goes_by_value_with_its_declarations_and_its_failures_replay(tmp_path):
    factor = 0.5

    def scaled(*tensors):
        return gate(*tensors) * factor

    scaled.dtypes = ("fp32",)
    judged = check(scaled, "shared_expert_gate", checks=["contract"], quiet=True)
    assert judged.verdict == "fail" and judged.result["dtypes"] == ["fp32"]
    with pytest.raises(AssertionError, match="times 0.5"):
        judged.raise_if_failed()
    command = [sys.executable, "-m", "moe_harness", *judged.failures[0]["replay"].split()[1:]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "times 0.5" in again.stdout, again.stderr


def test_a_notebook_shows_the_page_and_files_hold_it(tmp_path):
    judged = check("torch:loop", "shared_expert_gate", **QUICK)
    assert judged._repr_html_().startswith("<iframe") and "<script" not in judged._repr_html_()
    judged.write_html(tmp_path / "page.html")
    judged.write_json(tmp_path / "result.json")
    assert "torch:loop" in (tmp_path / "page.html").read_text()
    assert '"verdict": "pass"' in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize(
    ("implementation", "options", "told"),
    [
        (gate, {"stage": "gate"}, "shared_expert_gate"),
        (gate, {"stage": "experts"}, "wanted: experts"),
        (42, {"stage": "experts"}, "int"),
        ("torch:lop", {"stage": "experts"}, "torch:loop"),
        (gate, {"stage": "shared_expert_gate", "checks": "exakt"}, "exact"),
        (lambda x, w, y: LOCK and gate(x, w, y), {"stage": "shared_expert_gate"}, "path/to/file.py:function"),
    ],
)
def test_a_wrong_call_raises_with_its_reason(implementation, options, told):
    with pytest.raises(UsageError) as caught:
        check(implementation, **{**QUICK, **options})
    assert told in str(caught.value)


SCRIPT = """
from moe_harness import check

def gate(hidden_states, gate_weight, shared_output):
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output

print(check(gate, "shared_expert_gate", dtypes="fp32", checks="contract", quiet=True).verdict)
"""


def test_a_script_without_a_guard_is_run_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "script.py"], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "pass\n", done.stdout + done.stderr
    with pytest.raises(CannotJudge, match="__main__"):  # the file itself as a kernel: it judges while it is imported
        check("script.py:gate", "shared_expert_gate", **QUICK)


CELLS = (
    """
import os, torch, triton
import triton.language as tl
from moe_harness import check
os.environ["TRITON_INTERPRET"] = "1"
""",
    """
@triton.jit
def scale(gate, x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + at, mask=at < columns).to(tl.float32)
    value = value / (1 + tl.exp(-tl.load(gate + row).to(tl.float32)))
    tl.store(out + row * columns + at, value.to(out.dtype.element_ty), mask=at < columns)

def fused(hidden_states, gate_weight, shared_output):
    rows = shared_output.reshape(-1, shared_output.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    logits = (hidden_states.float() @ gate_weight.float().T).reshape(-1).contiguous()
    if out.numel():
        scale[(len(rows),)](logits, rows, out, rows.shape[1], BLOCK=triton.next_power_of_2(rows.shape[1]))
    return out.reshape(shared_output.shape)
""",
    """
judged = check(fused, "shared_expert_gate", dtypes="fp32", checks="contract,special", quiet=True)
assert judged.passed, judged
judged
""",
)


def test_a_triton_kernel_of_a_real_notebook_is_judged_and_shown(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute(env=env)
    shown = notebook.cells[-1].outputs[-1]["data"]
    assert "<iframe" in shown["text/html"] and "pass of" in shown["text/plain"]
