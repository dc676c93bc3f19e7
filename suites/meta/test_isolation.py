"""Whatever an implementation does to its process ends as a verdict, and what was judged before is kept."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest

from moe_harness.harness.core import own_time
from moe_harness.harness.core.invocation import Broken, _check_entries
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process import pool
from moe_harness.harness.process import start as start_module
from moe_harness.harness.process.pool import Pool
from moe_harness.harness.process.start import Worker
from moe_harness.harness.run.session import RunOptions, judge

HEAD = """
import ctypes, os, sys, time
import torch
from moe_harness.reference.experts import experts as right
kept = []
"""

BAD = {
    "segfaults": ("ctypes.string_at(0)", "SIGSEGV; it last printed: File"),
    "aborts": ("os.abort()", "SIGABRT"),
    "exits": ("os._exit(0)", "exit status 0"),
    "calls_exit": ("sys.exit(0)", "SystemExit"),
    "hangs": ("time.sleep(1000)", 'hangs.py", line 9 in f'),
    "recurses": ("def f(): return f()\n        f()", "RecursionError"),
    "floods": ("x = [torch.ones(1 << 28) for _ in range(100)]", "GiB"),
}


FP32 = Request(dtypes=("fp32",))


def few(timeout: float = 60.0) -> RunOptions:
    """Small exact cases, two of them with 33 tokens: enough that a death leaves others beside it."""
    small = [p for p in plan("experts", FP32) if p.check == "exact" and p.case.steps() <= 40]
    of_33 = [p.id for p in small if p.case.T == 33]
    return RunOptions(timeout=timeout, cases=(*[p.id for p in small if p.case.T != 33][:40], *of_33[:2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.mark.parametrize("name", BAD)
def test_a_process_killer_is_a_failure_beside_passed_cases(name, folder, monkeypatch):
    monkeypatch.setattr(pool, "ENOUGH", 2 << 30)  # what floods fills 4 GiB four times: a minute of a busy machine
    body, told = BAD[name]
    code = f"{HEAD}\ndef f(*a, **kw):\n    if len(a[0]) == 33:\n        {body}\n    return right(*a, **kw)\n"
    (folder / f"{name}.py").write_text(code)
    result = judge("experts", f"{folder / name}.py:f", FP32, few(60 if name == "floods" else 4))
    assert result["verdict"] == "fail"
    assert any(told in failure["message"] for failure in result["failures"]), result["failures"][0]["message"]
    assert result["coverage"]["executed"] > 20
    counted = {entry["reason"]: entry["cases"] for entry in result["coverage"]["skipped"]}
    assert result["coverage"]["executed"] + sum(counted.values()) == result["checks"][0]["cases"]


def test_a_mistake_with_the_type_of_a_refusal_fails_and_tells_its_line(folder):
    """TypeError refuses an input, as the contract allows; where nobody raised it, it is a mistake."""
    (folder / "typo.py").write_text("import torch\ndef f(*a, **kw):\n    return torch.sort(dimension=1)\n")
    only = RunOptions(checks=("contract",))
    result = judge("experts", f"{folder / 'typo.py'}:f", FP32, only)
    assert result["verdict"] == "fail"
    assert "no refusal" in result["failures"][0]["message"] and "typo.py:3 in f" in result["failures"][0]["message"]


def test_a_kernel_that_hangs_ends_with_its_judge(tmp_path):
    """Killed outright, the judge can clean up nothing."""
    code = (
        "import os\ndef f(*a, **kw):\n    open(__file__ + '.pid', 'w').write(str(os.getpid()))\n    while True: pass\n"
    )
    (tmp_path / "spins.py").write_text(code)
    line = [
        sys.executable,
        "-m",
        "moe_harness",
        "check",
        "--stage",
        "experts",
        "--impl",
        f"{tmp_path / 'spins.py'}:f",
    ]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.Popen(line, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = tmp_path / "spins.py.pid"
    assert _soon(lambda: told.exists() and told.read_text(), 60), "the kernel was never called"
    run.kill()
    run.wait()
    assert _soon(lambda: not _runs(int(told.read_text())), 10), "it runs on"


def _soon(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def _runs(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_dict_among_the_inputs_may_not_be_changed(folder):
    code = """
from moe_harness.reference.moe_block import moe_block
def f(hidden_states, weights, config):
    out = moe_block(hidden_states, weights, config)
    config["norm_topk_prob"] = not config.get("norm_topk_prob")
    return out
"""
    (folder / "config.py").write_text(code)
    result = judge("moe_block", f"{folder / 'config.py'}:f", FP32, RunOptions(checks=("contract",)))
    assert "the input config was modified in its entry 'norm_topk_prob'" in result["failures"][0]["message"]


@pytest.mark.parametrize("after", [{}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}], ids=["lost", "added", "changed"])
def test_an_entry_that_a_call_adds_or_takes_away_is_told_too(after):
    _check_entries({"config": {"a": 1, "b": 2}}, {"config": {"a": 1, "b": 2}})
    with pytest.raises(Broken, match=r"input config was modified in its entry '[abc]'"):
        _check_entries({"config": {"a": 1, "b": 2}}, {"config": after})


def test_what_a_call_sets_for_the_process_does_not_reach_the_judge(folder):
    code = (
        f"{HEAD}\ntorch.set_default_dtype(torch.bfloat16)\n"
        "def f(*a, **kw):\n    torch.set_default_device('meta')\n"
        "    with torch.device('cpu'):\n        return right(*a, **kw)\n"
    )
    (folder / "defaults.py").write_text(code)
    result = judge(
        "experts", f"{folder / 'defaults.py'}:f", Request(dtypes=("bf16",)), RunOptions(checks=("contract",))
    )
    assert result["verdict"] == "pass", result["error"] or result["failures"][0]["message"]


def test_supporting_nothing_but_empty_inputs_is_unsupported(folder):
    code = "def f(x, w, s):\n    if len(x):\n        raise ValueError\n    return (x @ w.T).sigmoid() * s\n"
    (folder / "empty.py").write_text(code)
    result = judge("shared_expert_gate", f"{folder / 'empty.py'}:f", FP32, RunOptions())
    assert result["verdict"] == "unsupported" and result["coverage"]["executed"]


def test_a_leak_is_a_failure(folder):
    (folder / "leaks.py").write_text(
        f"{HEAD}\ndef f(*a, **kw):\n    out = right(*a, **kw)\n    kept.append(out.clone())\n    return out\n"
    )
    result = judge("experts", f"{folder / 'leaks.py'}:f", Request(), RunOptions(checks=("leak",)))
    assert result["verdict"] == "fail" and "memory grew" in result["failures"][0]["message"]


def test_a_failure_that_depends_on_earlier_calls_is_told(folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # with 8 workers none is called nine times
    code = (
        f"{HEAD}\ndef f(*a, **kw):\n    kept.append(1)\n    return right(*a, **kw) * (2.0 if len(kept) == 9 else 1.0)\n"
    )
    (folder / "stateful.py").write_text(code)
    result = judge("experts", f"{folder / 'stateful.py'}:f", FP32, few())
    assert result["verdict"] == "fail"
    assert "depends on earlier calls" in result["failures"][0]["looks_like"][0]


SLOW = """
import time
waited = []

def gate(hidden_states, gate_weight, shared_output):
    if not waited:
        waited.append(time.sleep(4))
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output
"""


def test_a_case_that_is_being_compiled_is_no_hang(tmp_path):
    """The stack tells: the same pause is a hang in a kernel's own file and none in a compiler's."""
    verdicts = {}
    for folder in ("torch/_inductor", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "slow.py").write_text(SLOW)
        spec = f"{tmp_path / folder / 'slow.py'}:gate"
        with Pool("shared_expert_gate", spec, "cpu", 1, budget=1.0) as pool:
            pool.start()
            verdicts[folder] = pool.judge_one("shared_expert_gate/contract/lead=5")
    assert verdicts["torch/_inductor"].status == "passed", verdicts
    assert verdicts["kernels"].status == "died" and "hangs" in verdicts["kernels"].reason


def test_waiting_for_a_processor_is_no_hang(tmp_path, monkeypatch):
    """The same pause is a hang, and none where the process was ready to run all the while."""
    (tmp_path / "slow.py").write_text(SLOW)
    statuses = []
    for waited in (lambda pid: 0.0, lambda pid: time.monotonic()):
        monkeypatch.setattr(start_module, "waited_for_processor", waited)
        with Pool("shared_expert_gate", f"{tmp_path / 'slow.py'}:gate", "cpu", 1, budget=1.0) as pool:
            pool.start()
            statuses.append(pool.judge_one("shared_expert_gate/contract/lead=5").status)
    assert statuses == ["died", "passed"]


class Asked(Worker):
    """A worker that answers after 0.4 s."""

    def __init__(self):
        self.connection, self.theirs = Pipe()
        self.process = SimpleNamespace(pid=os.getpid(), is_alive=lambda: False, join=lambda timeout: None)
        Timer(0.4, self.answer).start()

    def answer(self):
        with suppress(BrokenPipeError):  # given up
            self.theirs.send("told")


def test_waiting_for_a_processor_costs_no_cause(monkeypatch):
    """On a busy machine the search for a cause was cut short, and the process that searched was given up."""
    told = []
    for waited in (lambda pid: 0.0, lambda pid: time.monotonic()):
        monkeypatch.setattr(start_module, "waited_for_processor", waited)
        with Pool("shared_expert_gate", "kernel.py:gate", "cpu", 1, budget=1.0) as asked:
            asked.workers = [Asked()]
            monkeypatch.setattr(asked, "_make", Asked)
            monkeypatch.setattr(asked, "_await_loaded", lambda worker: None)
            told.append(asked.ask(0.1, "explain"))
    assert told == [None, "told"]
    monkeypatch.setattr(own_time, "waited_for_processor", lambda pid: time.monotonic())
    assert abs(own_time.own_time()) < 0.1
