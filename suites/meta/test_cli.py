"""The command line, as its users meet it: exit statuses, messages of a few lines, JSON, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_harness.harness.commands.check import _keeper
from moe_harness.harness.core.plan import Request
from moe_harness.harness.run.result_builder import Listener, ResultBuilder
from moe_harness.suites.command import run, run_apart

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import torch
from torch.nn.functional import silu, gelu

def right(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    act = silu if activation == "silu" else lambda g: gelu(g, approximate="tanh")
    ids = topk_ids if expert_map is None else torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)])
    out = torch.zeros(hidden_states.shape)
    for e in ids[ids >= 0].unique().tolist():
        t, s = (ids == e).nonzero(as_tuple=True)
        g, u = (hidden_states[t] @ gate_up_proj[e].T).chunk(2, -1)
        out.index_add_(0, t, topk_weights[t, s, None].float() * ((act(g) * u) @ down_proj[e].T).float())
    return out.to(hidden_states.dtype)

def halved(*args, **kw): return right(*args, **kw) / 2
def swapped(x, w, *args, **kw):
    g, u = w.chunk(2, 1)
    return right(x, __import__("torch").cat([u, g], 1), *args, **kw)
def wrong_shape(*args, **kw): return right(*args, **kw)[:, :-1]
def wrong_dtype(*args, **kw): return right(*args, **kw).double()
def no_tensor(*args, **kw): return "done"
def a_pair(*args, **kw): return right(*args, **kw), None
def refuses(*args, **kw): raise NotImplementedError("not today")
def slow(*args, **kw):
    import time; time.sleep(0.2)
    open("calls", "a").write(".")
    return right(*args, **kw)
def only_bf16(*args, **kw): return right(*args, **kw)
only_bf16.dtypes = ("bf16",)
def bad_declaration(*args, **kw): return right(*args, **kw)
bad_declaration.rounds = ("everything",)
def other(hidden_states, weights): ...
def plain(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids):
    return right(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
class Box:
    def __init__(self, *args): ...
    @staticmethod
    def run(*args, **kw): return right(*args, **kw)
Box.run.dtypes = None
def nowhere(*args, **kw): return right(*args, **kw)
nowhere.dtypes = ()
not_a_function = 3
"""


GATE = """
def one(hidden_states, gate_weight, shared_output):
    return (hidden_states @ gate_weight.T).sigmoid() * shared_output
two = one
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernel.py").write_text(KERNEL)
    (folder / "gate.py").write_text(GATE)
    (folder / "broken.py").write_text("import torch\nvalue = 1 / 0\n")
    (folder / "dies.py").write_text("import os\nos._exit(7)\n")
    (folder / "syntax.py").write_text("def f(:\n")
    return folder


def judge(folder, attribute, *more):
    return run(folder, "check", "--stage", "experts", "--impl", f"kernel.py:{attribute}", "--check", "contract", *more)


@pytest.mark.parametrize(
    ("attribute", "told"),
    [
        ("halved", "the result is the value times 0.5"),
        ("wrong_shape", "but should have ["),
        ("wrong_dtype", "the dtype float64, but should have float32"),
        ("no_tensor", "is str, but should be a tensor"),
        ("a_pair", "but should return one tensor"),
    ],
)
def test_a_wrong_kernel_fails_and_says_why(kernels, attribute, told):
    done = judge(kernels, attribute, "--fail-fast")
    assert done.returncode == 1, done.stderr
    assert told in " ".join(done.stdout.split())
    assert "moe-harness replay" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_right_kernel_passes_and_its_json_says_so(kernels):
    done = judge(kernels, "right", "--check", "exact", "--dtype", "fp32", "--json", "out.json",
                 "--html", "out.html")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((kernels / "out.json").read_text())
    assert (result["schema"], result["verdict"], result["stage"]) == (1, "pass", "experts")
    assert {check["name"] for check in result["checks"]} == {"contract", "exact"}
    assert all({"name", "cases", "failed", "unsupported"} <= set(check) for check in result["checks"])
    assert result["failures"] == [] and result["coverage"]["executed"] > 100
    assert "<html" in (kernels / "out.html").read_text()


def test_fail_fast_ends_at_the_first_failure_and_tells_its_cause_at_once(kernels):
    done = run(kernels, "check", "-s", "experts", "-i", "kernel.py:swapped", "--fail-fast", "--json", "first.json")
    assert done.returncode == 1, done.stderr
    assert "gate_up_swapped" in done.stderr  # the live report; standard output has the final one
    result = json.loads((kernels / "first.json").read_text())
    assert 1 <= len(result["failures"]) <= 2
    assert any("--fail-fast" in entry["reason"] for entry in result["coverage"]["skipped"])
    assert result["coverage"]["executed"] < 20


def test_last_failed_judges_only_what_failed(kernels):
    first = judge(kernels, "wrong_shape", "--json", "before.json")
    assert first.returncode == 1
    failed = json.loads((kernels / "before.json").read_text())["failures"]
    again = run(kernels, "check", "-s", "experts", "-i", "kernel.py:wrong_shape", "--last-failed", "--json", "lf.json")
    result = json.loads((kernels / "lf.json").read_text())
    assert again.returncode == 1 and sum(check["cases"] for check in result["checks"]) == len(failed)
    done = judge(kernels, "right", "--last-failed")
    assert done.returncode == 0 and "no failure of the last run is known" in done.stderr


def test_a_failure_replays_from_its_line(kernels):
    judge(kernels, "halved", "--fail-fast", "--json", "halved.json")
    failure = json.loads((kernels / "halved.json").read_text())["failures"][0]
    assert {"check", "case", "message", "headroom", "where", "diagnosis", "replay"} <= set(failure)
    line = failure["replay"].split()[1:]
    again = run(kernels, *line)
    assert again.returncode == 1 and "slot 0 counts 0.5 times" in " ".join(again.stdout.split())
    assert run(kernels, *[word.replace("halved", "right") for word in line]).returncode == 0


def test_refusing_everything_is_unsupported_and_not_a_pass(kernels):
    done = judge(kernels, "refuses", "--json", "refuses.json")
    assert done.returncode == 3
    assert json.loads((kernels / "refuses.json").read_text())["verdict"] == "unsupported"
    assert "not today" in done.stdout


def test_declared_dtypes_are_the_ones_judged(kernels):
    done = judge(kernels, "only_bf16", "--json", "bf16.json")
    assert done.returncode == 0
    assert json.loads((kernels / "bf16.json").read_text())["dtypes"] == ["bf16"]
    assert judge(kernels, "only_bf16", "--dtype", "fp32").returncode == 3


def test_a_function_inside_a_class_is_found_and_none_declares_nothing(kernels):
    assert judge(kernels, "Box.run", "--dtype", "fp16").returncode == 0


def test_missing_keywords_are_unsupported_where_they_matter(kernels):
    done = judge(kernels, "plain", "--json", "plain.json")
    assert done.returncode == 0
    result = json.loads((kernels / "plain.json").read_text())
    assert any("has no parameter" in entry["reason"] for entry in result["coverage"]["unsupported"])


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("--stage", "expert", "--impl", "torch:loop"), 2, "did you mean 'experts'"),
        (("--stage", "experts", "--impl", "torch:lop"), 2, "torch:loop"),
        (("--stage", "experts", "--impl", "missing.py:f"), 2, "there is no file missing.py"),
        (("--stage", "experts", "--impl", "kernel.py:rihgt"), 2, "right"),
        (("--stage", "experts", "--impl", "kernel.py"), 2, "kernel.py:FUNCTION"),
        (("--stage", "experts", "--impl", "kernel.py:other"), 2, "wanted: experts("),
        (("--stage", "experts", "--impl", "kernel.py:not_a_function"), 2, "should be a function"),
        (("--stage", "experts", "--impl", "kernel.py:Box"), 2, "is a class"),
        (("--stage", "experts", "--impl", "kernel.py:bad_declaration"), 2, "'everything'"),
        (("--stage", "experts", "--impl", "kernel.py:nowhere"), 2, "'dtypes' is empty"),
        (("--stage", "experts", "--impl", "broken.py:f"), 3, "ZeroDivisionError"),
        (("--stage", "experts", "--impl", "syntax.py:f"), 3, "syntax.py:1"),
        (("--stage", "experts", "--impl", "dies.py:f"), 3, "exit status 7"),
        (("--stage", "experts", "--impl", "no.such.module:f"), 2, "no.such.module"),
        (("--stage", "experts", "--impl", "torch:loop", "--dtype", "fp8"), 2, "fp8"),
        (("--stage", "experts", "--impl", "torch:loop", "--profile", "quik"), 2, "quick"),
        (("--stage", "experts", "--impl", "torch:loop", "--config", "qwen3-30b"), 2, "qwen3-30b-a3b"),
        (("--stage", "sampler", "--impl", "torch", "--config", "deepseek-v3"), 2, "no cases to the stage sampler"),
        (("--stage", "dispatcher", "--impl", "dispatchers:ring", "--config", "deepseek-v3"), 2, "no cases over ranks"),
        (("--stage", "experts", "--impl", "torch:loop", "--device", "tpu"), 2, "did you mean 'cpu'"),
        (("--stage", "experts", "--impl", "torch:loop", "--check", "exakt"), 2, "exact"),
        (("--stage", "experts", "--impl", "torch:loop", "--json", "no/such/folder.json"), 2, "folder"),
        (("--stage", "experts", "--impl", "torch:loop", "--nonsense"), 2, "--nonsense"),
        (("--stage", "experts"), 2, "--impl"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else None,
)
def test_a_wrong_call_is_told_in_a_few_lines(kernels, arguments, status, told):
    done = run(kernels, "check", *arguments)
    assert done.returncode == status, done.stderr
    assert told in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 12


def test_cuda_asked_for_and_absent(kernels):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = judge(kernels, "right", "--device", "cuda")
    assert done.returncode == 3
    assert "--device cpu" in done.stderr


def test_one_that_cannot_be_loaded_does_not_lose_the_others(kernels):
    done = judge(kernels, "right", "--impl", "broken.py:f", "--json", "both.json")
    assert done.returncode == 3
    runs = json.loads((kernels / "both.json").read_text())["runs"]
    assert [one["verdict"] for one in runs] == ["pass", "error"]


def heed_ctrl_c():
    """A shell starts what it puts into the background with Ctrl-C ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_the_report_of_what_was_judged(kernels):
    command = [
        sys.executable,
        "-m",
        "moe_harness",
        "check",
        "--stage",
        "experts",
        "--impl",
        "kernel.py:slow",
    ]
    command += ["--json", "interrupted.json"]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, cwd=kernels, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=heed_ctrl_c)  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and not ((kernels / "calls").exists() and (kernels / "calls").stat().st_size > 40):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    result = json.loads((kernels / "interrupted.json").read_text())
    assert result["interrupted"] and result["coverage"]["executed"] > 0
    assert process.returncode == 3
    assert "contract" in stdout and "Traceback" not in stderr


def test_list_names_what_there_is(kernels):
    done = run_apart(kernels, "list", "--stage", "experts")
    assert done.returncode == 0
    for name in ("torch:loop", "torch:grouped_mm", "transformers:eager", "liger", "qwen3-30b-a3b", "batch_invariance"):
        assert name in done.stdout
    assert done.stdout.startswith("experts(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, ")


def test_a_replay_line_names_the_device_where_it_is_not_the_default():
    lines = [ResultBuilder("experts", "my kernel.py:f", Request(device=device), Listener()).replay_line(["a/b/T=3"])
             for device in ("cpu", "cuda")]  # fmt: skip
    assert lines == [line := "moe-harness replay a/b/T=3 --impl 'my kernel.py:f'", f"{line} --device cuda"]


def test_the_version_costs_no_run(kernels):
    done = run_apart(kernels, "--version")
    assert done.returncode == 0 and done.stdout.startswith("moe-harness 0.") and "\ntorch 2." in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_report_is_the_machines_trouble(kernels, unbuffered):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moe_harness", "explain", "exact"]
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert "ignored" not in done.stderr
    assert done.returncode == 3 and "this machine failed" in done.stderr and "No space left" in done.stderr


def test_an_unfinished_result_that_cannot_be_kept_does_not_end_the_run(tmp_path):
    """Its folder is gone, or its disk is full: what was judged is told all the same."""
    keep = _keeper(tmp_path / "gone" / "out.json", [])
    keep({"verdict": "error", "failures": []})
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("check --stage ex", ["experts"]),
        ("check --impl torch:lo", ["torch:loop"]),
        ("check --check numeric,dens", ["numeric,dense"]),
        ("bench --stage ex", ["experts"]),
        ("bench --impl torch:lo", ["torch:loop"]),
        ("replay id --impl torch:lo", ["torch:loop"]),
        ("init experts --library tri", ["triton"]),
        ("explain partial_s", ["partial_sum"]),
        ("explain gate_up_swa", ["gate_up_swapped", "gate_up_swapped_in_block"]),
        ("faults --stage ex", ["experts"]),
        ("faults --fault gate_up_swa", ["gate_up_swapped", "gate_up_swapped_in_block"]),
    ],
)
def test_the_shell_completes_what_the_command_knows(words, wanted):
    line = f"moe-harness {words}"
    asked = {"_MOE_HARNESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = "import sys; sys.argv[0] = 'moe-harness'; from moe_harness.harness.commands.app import main; main()"
    env = os.environ | {"PYTHONPATH": os.getcwd(), **asked}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == wanted, done.stderr


def test_lists_take_commas_and_names_any_usual_spelling(kernels):
    done = run(kernels, "check", "--stage", "shared_expert_gate", "--impl", "gate.py:one,gate.py:two",
               "--dtype", "bfloat16,torch.float32", "--check", "laws,contract", "--config", "Qwen3-Next-80B-A3B",
               "--json", "lists.json")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((kernels / "lists.json").read_text())["runs"]
    assert [one["impl"] for one in runs] == ["gate.py:one", "gate.py:two"]
    assert {check["name"] for check in runs[0]["checks"]} == {"contract", "laws"}
    assert runs[0]["dtypes"] == ["bf16", "fp32"] and runs[0]["config"] == "qwen3-next-80b-a3b"


def test_what_of_a_model_is_not_judged_stands_beside_the_verdict(kernels):
    done = judge(kernels, "right", "--dtype", "fp32", "--config", "GPT-OSS-20B", "--html", "oss.html")
    assert done.returncode == 0 and "mxfp4" in done.stdout.partition("PASS")[2], done.stdout
    assert "mxfp4" in (kernels / "oss.html").read_text()


NEIGHBOURS = """
def right(*args, **kw):
    import reference  # at the first call, not at the import
    from fixtures.data import one
    from harness.inner import right
    assert reference.IS_THEIRS
    return right(*args, **kw) * one
"""


def test_a_module_of_the_current_folder_has_neighbours_of_any_name(tmp_path):
    for folder in ("theirs", "harness", "fixtures"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "theirs" / "kernel.py").write_text(NEIGHBOURS)
    (tmp_path / "harness" / "inner.py").write_text(KERNEL)
    (tmp_path / "fixtures" / "data.py").write_text("one = 1\n")
    (tmp_path / "reference.py").write_text("IS_THEIRS = True\n")
    for spec in ("theirs.kernel:right", "theirs/kernel.py:right"):
        if spec.endswith(".py:right"):  # a file's neighbours are those of its own folder
            for name in ("harness", "fixtures", "reference.py"):
                (tmp_path / name).rename(tmp_path / "theirs" / name)
        done = run_apart(
            tmp_path, "check", "--stage", "experts", "--impl", spec, "--check", "contract", "--dtype", "fp32"
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_replay_of_a_malformed_case(kernels):
    for case in ("experts/exact", "experts/exact/T=x", "experts/exact/Q=3", "experts/exakt/T=3"):
        done = run(kernels, "replay", case, "--impl", "torch:loop")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


def test_the_controlling_process_imports_no_torch():
    code = "import sys; from moe_harness.harness.run import property_search, session; "
    code += "from moe_harness.harness.report import html; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert done.stdout.strip() == "False", done.stderr
