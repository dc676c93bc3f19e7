"""Questions and scores by lm-eval itself, and the command from end to end.

`tox -e accuracy` runs these; ACCURACY_QUESTIONS says how many questions the comparison of whole models gets.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_harness import fixtures
from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate import exchange, steps, task
from moe_harness.harness.gate.answerers import Settings, find
from moe_harness.harness.gate.exchange import Answer

pytestmark = pytest.mark.accuracy
MODEL = Path(fixtures.__file__).parent / "checkpoints" / "arithmetic-moe"
GSM8K = Path(fixtures.__file__).resolve().parents[1].parent / "shared" / "gsm8k"
QUESTIONS = int(os.environ.get("ACCURACY_QUESTIONS", "16"))


def answered(requests, text):
    return {request.key: Answer(request.key, text(request), 9, "stop") for request in requests}


def test_the_prompt_is_that_of_gsm8k_with_three_examples():
    (request,) = task.collect(task.Asked("arithmetic", limit=1))
    assert request.prompt.count("Question: ") == request.prompt.count("\nAnswer:") == 4
    assert request.prompt.endswith("\nAnswer:") and request.gold.startswith(" ") and "\n#### " in request.gold
    assert (request.until, request.max_new_tokens, request.temperature) == (("Question:",), 128, 0.0)


def draws(limit, seed=0):
    return [request.doc_id for request in task.collect(task.Asked("arithmetic", limit=limit, seed=seed))]


def drawn_and_not_the_first():
    return draws(30) != list(range(30)) and max(draws(30)) > 500


def test_a_limit_draws_questions_by_the_seed():
    assert drawn_and_not_the_first()
    assert draws(30) == draws(30)


def test_planted_limit_that_takes_the_first(monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/2598"""
    monkeypatch.setattr(task, "_samples", lambda asked, documents: list(range(asked.limit)))
    assert not drawn_and_not_the_first()


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "valid"),
    [("{gold}", 1, 1, 1), (" #### {n}", 1, 1, 1), (" It is {n}.", 0, 1, 0), (" #### {n}1", 0, 0, 1), ("", 0, 0, 0),
     (" #### {n}\n#### 7", 1, 0, 1)],
)  # fmt: skip
def test_scores_are_those_of_lm_eval(text, strict, flexible, valid):
    asked = task.Asked("arithmetic", limit=3)
    requests = task.collect(asked)
    answers = answered(requests, lambda r: text.format(gold=r.gold, n=r.gold.rpartition("#### ")[2]))
    for row in task.score(asked, requests, answers):
        assert (row.right[task.STRICT], row.valid[task.STRICT]) == (bool(strict), bool(valid))
        assert row.right[task.FLEXIBLE] == bool(flexible)


def test_answers_that_are_missing_are_no_wrong_answers():
    asked = task.Asked("arithmetic", limit=3)
    requests = task.collect(asked)
    answers = answered(requests[:2], lambda request: request.gold)
    with pytest.raises(CannotJudge, match="1 of 3 questions have no answer"):
        task.score(asked, requests, answers)


def repeats_are_told_apart(monkeypatch):
    monkeypatch.setitem(task._ARITHMETIC, "repeats", 2)
    asked = task.Asked("arithmetic", limit=2)
    requests = task.collect(asked)
    answers = answered(requests, lambda request: request.gold if request.repeat == 0 else " none")
    if len(answers) != 4:
        return False
    return all(row.right[task.STRICT] for row in task.score(asked, requests, answers))  # lm-eval takes the first


def test_repeats_are_requests_of_their_own(monkeypatch):
    assert repeats_are_told_apart(monkeypatch)


def test_planted_repeats_that_collapse(monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/pull/3715"""
    monkeypatch.setattr(exchange.Request, "key", property(lambda self: exchange.digest([self.task, self.prompt])))
    assert not repeats_are_told_apart(monkeypatch)


def test_requests_of_another_version_of_the_data_are_refused(tmp_path):
    from moe_harness.fixtures.arithmetic import write_dataset

    write_dataset(tmp_path, test=5, train=5)
    asked = task.Asked("arithmetic", data=str(tmp_path))
    requests = task.collect(asked)
    answers = answered(requests, lambda request: request.gold)
    assert len(task.score(asked, requests, answers)) == 5
    write_dataset(tmp_path, test=5, train=5, seed=1)
    with pytest.raises(CannotJudge, match="make them anew"):
        task.score(asked, requests, answers)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs the questions of GSM8K in {GSM8K.name}/ beside the tree")
def test_gsm8k_from_a_folder_is_asked_in_the_stock_form():
    asked = task.Asked("gsm8k", data=str(GSM8K), limit=5)
    requests = task.collect(asked)
    assert all(request.prompt.count("Question: ") == 6 for request in requests)
    rows = task.score(asked, requests, answered(requests, lambda request: request.gold))
    assert all(row.right[name] for row in rows for name in (task.STRICT, task.FLEXIBLE))


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"task": "gsm9k"}, "did you mean"), ({"task": "arithmetic", "limit": 1_000_000_000}, "are the most"),
     ({"task": "arithmetic", "limit": 100_000, "data": "{}"}, "--limit is 100000"),
     ({"task": "arithmetic", "shots": 65}, "but there are 64"), ({"task": "gsm8k", "data": "{}", "shots": 6}, "are 5"),
     ({"task": "hellaswag", "data": "{}"}, "--data goes with"), ({"task": "gsm8k", "data": "{}/no"}, "train.jsonl")],
)  # fmt: skip
def test_a_task_that_cannot_be_asked_is_refused(tmp_path, asked, told):
    from moe_harness.fixtures.arithmetic import write_dataset

    write_dataset(tmp_path, test=2, train=5)
    asked = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in asked.items()}
    with pytest.raises(UsageError, match=told):
        task.collect(task.Asked(**asked))


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "holds no questions"), (b"\n\n", "holds no questions"), (b'{"question": "\xff', "not UTF-8"),
     (b'{"question": "1"}\n', "line 1: wanted"), (b"[]\n", "line 1: wanted"), (b"PAR1", "line 1: wanted")],
)  # fmt: skip
def test_a_folder_in_another_format_is_refused(tmp_path, content, told):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=told):
        task.collect(task.Asked("gsm8k", data=str(tmp_path)))


def test_questions_may_hold_any_letter_and_empty_lines_are_none(tmp_path):
    row = json.dumps({"question": "one\u2028two?", "answer": "#### 2"}, ensure_ascii=False)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{row}\n" * 6 + "\n", "utf-8")
    requests = task.collect(task.Asked("gsm8k", data=str(tmp_path)))
    assert len(requests) == 6 and requests[0].prompt.count("one\u2028two?") == 6


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "moe_harness", "gate", *map(str, arguments)], text=True,
                          capture_output=True)  # fmt: skip


KERNELS = """
import os, signal

def zero(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    return hidden_states * 0

def crash(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    os.kill(os.getpid(), signal.SIGSEGV)

def late(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    raise RuntimeError("device lost")
"""


def test_the_command_from_end_to_end(tmp_path):
    """One run of the baseline serves all candidates; each ends with its own status.

    The longest worked answer has 110 tokens, so that none is cut off at the task's own 128.
    """
    (tmp_path / "k.py").write_text(KERNELS)
    shared = ["--model", MODEL, "--baseline", "transformers:eager", "--task", "arithmetic", "--limit", QUESTIONS,
              "--shots", 0, "--dtype", "fp32", "--ledger", tmp_path / "ledger"]  # fmt: skip
    margin = 0.4 if QUESTIONS < 133 else 0.02  # as many as decide where nothing differs
    out = tmp_path / "r.json"
    done = run(*shared, "--candidate", "transformers:grouped_mm", "--margin", margin, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["accuracy"] == {"baseline": 1.0, "candidate": 1.0}
    assert (result["verdict"], result["documents"], result["discordant"]) == ("pass", QUESTIONS, [0, 0])
    wanted = {"schema", "verdict", "baseline", "candidate", "task", "documents", "accuracy", "drop", "interval",
              "discordant", "p", "needed", "gold_loglikelihood", "flips", "invalid", "lengths"}  # fmt: skip
    assert wanted <= set(result)

    done = run(*shared, "--candidate", f"{tmp_path / 'k.py'}:zero", "--json", out, "--html", tmp_path / "r.html")
    assert done.returncode == 1, done.stderr
    assert json.loads(out.read_text())["accuracy"]["candidate"] == 0.0
    assert (tmp_path / "r.html").stat().st_size > 2000
    for name, told in (("crash", "died of signal 11"), ("late", "RuntimeError: device lost")):
        done = run(*shared, "--candidate", f"{tmp_path / 'k.py'}:{name}")
        assert done.returncode == 3
        assert told in done.stderr


def test_a_wrong_call_ends_with_two():
    assert run("--task", "arithmetic").returncode == 2
    done = run("--model", MODEL, "--baseline", "transformers:eagre", "--candidate", "triton", "--task", "arithmetic",
               "--limit", 2)  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'eager'" in done.stderr


def test_three_steps_are_the_one(tmp_path):
    requests = tmp_path / "requests.jsonl"
    assert run("requests", "--task", "arithmetic", "--limit", 2, "--shots", 0, "--out", requests).returncode == 0
    for name in ("transformers:eager", "hflm:eager"):
        done = run("answer", requests, "--impl", name, "--model", MODEL, "--dtype", "fp32", "--out",
                   tmp_path / name[:4], "--ledger", tmp_path / "ledger")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "2 of 2 questions answered" in done.stderr
    result = steps.make_result(requests, tmp_path / "tran", tmp_path / "hflm", 0.9)
    assert (result["verdict"], result["discordant"]) == ("pass", [0, 0])
    assert result["flips"]["answers"] == 0  # our loop and lm-eval's own model say the same
    done = run("judge", requests, tmp_path / "tran", tmp_path / "hflm")
    assert done.returncode == 3
    assert "INCONCLUSIVE" in done.stdout and "133 questions would decide" in done.stdout


@pytest.mark.parametrize("shared", [{"tp": 2}, {"ep": 2, "dispatcher": "all_to_all"}])
def test_the_engine_answers_over_two_ranks_as_on_one(shared):
    asked = task.collect(task.Asked("arithmetic", limit=1, shots=0))
    settings = Settings(MODEL, dtype="fp32")
    (alone,) = find("qwen3_moe", settings).answer(asked)
    ranks = find("qwen3_moe", replace(settings, **shared))
    try:
        (answer,) = ranks.answer(asked)
    finally:
        ranks.close()
    assert (answer.text, answer.length, answer.gold.greedy) == (alone.text, alone.length, alone.gold.greedy)
    assert answer.text.startswith(asked[0].gold)
