"""Requests, answers and the ledger: what lies in a file comes back, and nobody is served another's answers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate import exchange, ledger, steps
from moe_harness.harness.gate.answering import answer_all, batches
from moe_harness.harness.gate.exchange import Answer, Gold, Request
from moe_harness.harness.gate.ledger import Ledger

REQUEST = Request("arithmetic 1.0", 7, "d", "p", 0, "Question: 1+1?\nAnswer:", " 2", ("Question:",), 16)
GOLD = Gold(-0.5, (3, 4), (3, 5), (((3, -0.1), (4, -2.0)), ((5, -0.2),)))


def requests(count):
    return [replace(REQUEST, doc_id=i, prompt=f"Question: {i}?\nAnswer:") for i in range(count)]


class Echo:
    """Answers with its name; remembers what it was asked."""

    traceable = True

    def __init__(self, name, fail_at=None):
        self.name, self.fail_at, self.asked = name, fail_at, []

    def identity(self):
        return {"spec": self.name}

    def answer(self, batch):
        self.asked.append([request.doc_id for request in batch])
        if self.fail_at == len(self.asked):
            raise RuntimeError("boom")
        return [Answer(request.key, self.name, 1, "stop") for request in batch]


def ask(who, folder, asked, **options):
    return answer_all(
        who, asked, Ledger(folder, who.identity(), **options), batch_size=4, timeout=60, told=lambda *_: None
    )


def test_requests_and_answers_come_back(tmp_path):
    exchange.write(tmp_path / "r", "gate-requests", {"asked": {}}, [REQUEST])
    assert exchange.read_requests(tmp_path / "r")[1] == [REQUEST]
    answers = [Answer("k", "text\nwith „quotes“", 3, "eos", GOLD), Answer("l", "", 0, "length")]
    exchange.write(tmp_path / "a", "gate-answers", {"identity": {}}, answers)
    assert list(exchange.read_answers(tmp_path / "a")[1].values()) == answers


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [(None, UsageError, "no file"), ("", UsageError, "should hold"), ("{}\n", UsageError, "should hold"),
     ("nonsense\n", CannotJudge, "line 1"),
     ('{"schema": 1, "kind": "gate-answers"}\n{"key": 3}\n', CannotJudge, "no answer")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path, text, error, told):
    if text is not None:
        (tmp_path / "a").write_text(text)
    with pytest.raises(error, match=told):
        exchange.read_answers(tmp_path / "a")


@pytest.mark.parametrize("change", [{"doc": 7}, {"until": None}, {"key": "k"}])
def test_a_line_that_is_no_request_is_refused_and_not_left_out(tmp_path, change):
    """Fewer questions than were asked would decide without a word."""
    path = tmp_path / "r"
    exchange.write(path, "gate-requests", {"asked": {}}, [REQUEST, REQUEST])
    first, second, last = path.read_text().splitlines()
    path.write_text("\n".join([first, second, json.dumps(json.loads(last) | change)]))
    with pytest.raises(CannotJudge, match="no request"):
        exchange.read_requests(path)


def test_a_file_is_whole_or_not_there(tmp_path):
    """And what was there before stays until then."""

    def broken_off():
        yield REQUEST
        raise KeyboardInterrupt

    exchange.write(tmp_path / "r", "gate-requests", {}, [REQUEST])
    with pytest.raises(KeyboardInterrupt):
        exchange.write(tmp_path / "r", "gate-requests", {}, broken_off())
    assert exchange.read_requests(tmp_path / "r")[1] == [REQUEST]


@pytest.mark.parametrize(
    "change",
    [{"task": "arithmetic 2.0"}, {"prompt": "another"}, {"gold": " 3"}, {"until": ("\n",)}, {"max_new_tokens": 17},
     {"temperature": 0.5}, {"repeat": 1}],
)  # fmt: skip
def test_whatever_changes_an_answer_changes_its_key(change):
    assert replace(REQUEST, **change).key != REQUEST.key


def test_what_does_not_change_an_answer_does_not_change_its_key():
    assert replace(REQUEST, doc_id=8, doc_hash="other").key == REQUEST.key


def candidate_answers_itself(folder):
    """After the baseline was asked the same."""
    asked, candidate = requests(6), Echo("candidate")
    ask(Echo("baseline"), folder, asked)
    answers = ask(candidate, folder, asked)
    return {answer.text for answer in answers.values()} == {"candidate"} and sum(map(len, candidate.asked)) == 6


def test_a_candidate_is_not_served_the_answers_of_the_baseline(tmp_path):
    assert candidate_answers_itself(tmp_path)


def test_planted_ledger_without_a_model_in_its_key(tmp_path, monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/4063"""
    monkeypatch.setattr(ledger, "digest", lambda identity: "one file for all")
    assert candidate_answers_itself(tmp_path)  # the file says in its first line whose it is
    monkeypatch.setattr(ledger, "_is_of", lambda line, identity: True)
    assert not candidate_answers_itself(tmp_path / "planted")


def another_version_is_asked_anew(folder):
    """The same prompts of a task whose version has changed."""
    again = Echo("a")
    ask(Echo("a"), folder, requests(6))
    ask(again, folder, [replace(request, task="arithmetic 2.0") for request in requests(6)])
    return sum(map(len, again.asked)) == 6


def test_answers_to_another_version_of_a_task_are_not_served(tmp_path):
    assert another_version_is_asked_anew(tmp_path)


def test_planted_key_without_the_version_of_the_task(tmp_path, monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/4084"""
    monkeypatch.setattr(Request, "key", property(lambda request: exchange.digest([request.prompt, request.until])))
    assert not another_version_is_asked_anew(tmp_path)


def test_the_same_one_is_not_asked_twice_unless_that_is_wanted(tmp_path):
    asked = requests(6)
    ask(Echo("a"), tmp_path, asked)
    for options, times in (({}, 0), ({"fresh": True}, 2)):
        again = Echo("a")
        assert len(ask(again, tmp_path, asked, **options)) == 6
        assert len(again.asked) == times


def test_an_interrupted_run_goes_on_with_the_same_batches(tmp_path):
    asked, whole = requests(10), Echo("a")
    ask(whole, tmp_path / "whole", asked)
    with pytest.raises(CannotJudge, match="RuntimeError: boom"):
        ask(Echo("a", fail_at=2), tmp_path, asked)
    rest = Echo("a")
    ask(rest, tmp_path, asked)
    assert rest.asked == whole.asked[1:]


def test_who_interrupts_is_told_that_nothing_is_lost(capsys):
    def interrupted(command, **given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.answer_in_a_process(["r.jsonl"], Path("out.jsonl"), "the candidate", run=interrupted)
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "told"), [(0, "status 0"), (1, "status 1"), (-11, "signal 11")])
def test_a_process_that_ends_without_answers_is_a_failure_of_the_run(tmp_path, code, told):
    """Even with the status of success, which a kernel that calls os._exit(0) gives it."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(CannotJudge, match=rf"gave no complete set of answers.*{told}"):
        steps.answer_in_a_process(
            [], out, "it", run=lambda command, **given: subprocess.CompletedProcess(command, code)
        )
    with pytest.raises(UsageError, match="was not asked"):
        steps.answer_in_a_process([], out, "it", run=lambda command, **given: subprocess.CompletedProcess(command, 2))
    out.write_text("")
    steps.answer_in_a_process([], out, "it", run=lambda command, **given: subprocess.CompletedProcess(command, 0))


SERVED = """
import sys, time
from multiprocessing.connection import Connection
from moe_harness.harness.process.parent_watch import end_with
end_with(Connection(int(sys.argv[-1]), writable=False))
time.sleep(0.5)
print("answering", flush=True)
time.sleep(600)
"""
ASKS = """
import subprocess, sys
from moe_harness.harness.gate.steps import run_answer
run_answer([], run=lambda command, **given: subprocess.run([sys.executable, "-c", sys.argv[1], command[-1]], **given))
"""


def test_who_answers_ends_with_who_asked_for_it():
    """Killed, `gate` would leave a process that answers on, beside that of the run that goes on."""
    asks = subprocess.Popen([sys.executable, "-c", ASKS, SERVED], stdout=subprocess.PIPE, text=True)
    assert asks.stdout.readline() == "answering\n"
    asks.kill()
    asks.communicate(timeout=60)  # the output of the two ends once both have ended


def test_how_far_the_answers_are_is_told_with_those_that_were_there(tmp_path):
    ask(Echo("a"), tmp_path, batches(requests(10), 4)[0])
    told, who = [], Echo("a")
    kept = Ledger(tmp_path, who.identity())
    answer_all(who, requests(10), kept, batch_size=4, timeout=60, told=lambda *said: told.append(said))
    assert [said[:2] for said in told] == [(4, 10), (8, 10), (10, 10)]
    assert math.isnan(told[0][2]) and told[1][2] > 0 and told[2][2] == 0


def test_a_kernel_that_calls_exit_is_no_wrong_answer(tmp_path):
    class Leaves(Echo):
        def answer(self, batch):
            sys.exit(0)

    with pytest.raises(CannotJudge, match="SystemExit"):
        ask(Leaves("a"), tmp_path, requests(2))


def lasting_run(who, folder, asked):
    """One run of `gate answer` with somebody whose source cannot be seen."""
    kept = Ledger(folder, who.identity(), lasting=False)
    answers = answer_all(who, asked, kept, batch_size=4, timeout=60, told=lambda *_: None)
    kept.delivered()
    return answers


def address_is_asked_anew(folder):
    """An interrupted run goes on; the next one is asked everything, since the server may have another kernel now."""
    asked, rest, later = requests(10), Echo("http://a"), Echo("http://a")
    with pytest.raises(CannotJudge):
        lasting_run(Echo("http://a", fail_at=2), folder, asked)
    lasting_run(rest, folder, asked)
    lasting_run(later, folder, asked)
    return [sum(map(len, who.asked)) for who in (rest, later)] == [6, 10]


def test_an_address_is_asked_anew_once_its_answers_were_delivered(tmp_path):
    assert address_is_asked_anew(tmp_path)


def test_planted_ledger_that_keeps_the_answers_of_an_address(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "delivered", lambda self: None)
    assert not address_is_asked_anew(tmp_path)


HANGS = """
import multiprocessing, sys, time
from pathlib import Path
from moe_harness.harness.gate.answering import answer_all
from moe_harness.harness.gate.exchange import Request
from moe_harness.harness.gate.ledger import Ledger

class Hangs:
    def answer(self, batch):
        time.sleep(60)

multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,)).start()  # a rank that hangs as well
asked = [Request("t", 0, "d", "p", 0, "q", "a", (), 1)]
answer_all(Hangs(), asked, Ledger(Path(sys.argv[1]), {}), batch_size=1, timeout=0.2, told=lambda *_: None)
"""


def test_somebody_who_does_not_return_ends_the_run_as_one_that_cannot_judge(tmp_path):
    """And its ranks with it: one that lived on would hold the pipe that is read here."""
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "no answers to a batch of 1 after 0.2 s (--timeout)" in done.stderr
    assert "time.sleep" in done.stderr or "in answer" in done.stderr


def test_a_line_that_was_cut_off_is_asked_again(tmp_path):
    asked = requests(3)
    ask(Echo("a"), tmp_path, asked)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    again = Echo("a")
    assert len(ask(again, tmp_path, asked)) == 3
    assert len(again.asked) == 1
    assert all(json.loads(line) for line in file.read_text().splitlines() if line.endswith("}"))
    third = Echo("a")
    assert len(ask(third, tmp_path, asked)) == 3 and not third.asked  # what stands behind it is read


def test_a_ledger_of_another_identity_is_not_read(tmp_path):
    ledger = Ledger(tmp_path, {"spec": "a"})
    ledger.add([Answer(REQUEST.key, "a", 1, "stop")])
    ledger.path.rename(Ledger(tmp_path, {"spec": "b"}).path)
    assert Ledger(tmp_path, {"spec": "b"}).answers == {}


@pytest.mark.parametrize("first", ["nonsense", "3", "{}", ""])
def test_a_ledger_that_does_not_say_whose_it_is_is_not_read(tmp_path, first):
    ledger = Ledger(tmp_path, {"spec": "a"})
    ledger.add([Answer(REQUEST.key, "a", 1, "stop")])
    answers = ledger.path.read_text().split("\n")[1:]
    ledger.path.write_text("\n".join([first, *answers]))
    assert Ledger(tmp_path, {"spec": "a"}).answers == {}


def test_an_answer_with_a_line_of_its_own_is_kept_whole(tmp_path):
    """U+2028 and U+0085 end lines for str.splitlines, and JSON does not escape them."""
    said = "one\u2028two\x85three\nfour"
    Ledger(tmp_path, {}).add([Answer(REQUEST.key, said, 1, "stop")])
    assert Ledger(tmp_path, {}).answers[REQUEST.key].text == said


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotJudge, match="--ledger names another folder"):
        Ledger(tmp_path / "file", {})
    kept = Ledger(tmp_path, {})
    kept.path = Path("/dev/full")
    with pytest.raises(CannotJudge, match=r"No space left.*--ledger"):
        kept.add([Answer(REQUEST.key, "a", 1, "stop")])


def test_batches_do_not_depend_on_what_is_answered_already():
    asked = requests(9)
    assert batches(asked, 4) == batches(asked[::-1], 4)
    assert [len(batch) for batch in batches(asked, 4)] == [4, 4, 1]


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [(["--dispatcher", "naive"], 2, "give --ep N"), (["--device", "cuda"], 3, "no CUDA device here"),
     (["--device", "tpu"], 2, "tpu"), (["--dtype", "fp8"], 2, "fp8")],
)  # fmt: skip
def test_a_call_that_cannot_be_answered_is_refused_before_anything_is_asked(options, status, told, monkeypatch):
    import torch

    from moe_harness.harness.commands.app import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("gate --baseline a --candidate b", "gate answer r --impl a --out o"):
        with pytest.raises((UsageError, CannotJudge), match=told) as refused:
            app([*command.split(), *options], standalone_mode=False)
        assert refused.value.exit_status == status
