"""The commands: what a run found is kept with where it came from, and compared at once where that is asked for."""

import json
import subprocess
from pathlib import Path

import pytest

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.record import line, store, view
from moe_harness.suites.record.test_compare import BENCH, CHECK, GATE


def test_a_run_is_kept_with_the_commit_of_whose_kernels_are_judged(tmp_path, monkeypatch):
    """Beside that of moe-harness, which the project may have installed."""
    monkeypatch.chdir(tmp_path)
    assert line.environment()["project"] == {"commit": None, "dirty": None}
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for words in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = line.environment()
    assert found["project"] == {"commit": head, "dirty": False} and found["commit"] != head
    page = dict(view.digest(line.lines(CHECK)[0]))
    assert page["commit of the project"] == head[:12]


def run(*arguments):
    """The command's exit status."""
    from moe_harness.harness.commands.app import app

    try:
        return app(list(map(str, arguments)), standalone_mode=False) or 0
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("dashes", [(), ("--",)])
def test_a_command_is_recorded_with_its_options(tmp_path, monkeypatch, dashes):
    from moe_harness.harness.commands import record

    asked = []
    monkeypatch.setattr(record, "_run", lambda command, into: asked.append((command, into)) or 0)
    command = ["gate", "--model", "DIR", "--json=own.json", "-i", "triton", "--fresh"]
    assert run("record", "--into", tmp_path / "runs.jsonl", *dashes, *command) == 0
    assert asked == [(command, tmp_path / "runs.jsonl")]


@pytest.mark.parametrize("words", [["a.json", "--unto", "b"], ["--stage", "experts"], ["-i", "triton", "check"]])
def test_an_option_that_record_has_not_is_told(words):
    with pytest.raises(UsageError, match=f"record has no option {next(w for w in words if w.startswith('-'))}, only"):
        run("record", *words)


def test_the_commands_record_and_compare(tmp_path, capsys):
    for name, result in (
        ("a", CHECK),
        ("b", CHECK | {"checks": [CHECK["checks"][0] | {"failed": 1}], "verdict": "fail"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        assert run("record", tmp_path / f"{name}.json", "--into", tmp_path / f"{name}.jsonl") == 0
    same = (tmp_path / "a.jsonl", tmp_path / "a.json")
    assert run("compare", *same) == 0
    assert run("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json", tmp_path / "c.json") == 1
    assert json.loads((tmp_path / "c.json").read_text())["verdict"] == "fail"
    assert "regression" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--json", "{}"], ["--json={}"], []])
def test_a_command_writes_its_json_where_it_asked_for_it(tmp_path, monkeypatch, asked):
    from moe_harness.harness.commands import record

    others = subprocess.run

    def run(command, **given):
        if "moe_harness" not in command:  # git's
            return others(command, **given)
        words = " ".join(command).replace("=", " ").split()
        Path(words[words.index("--json") + 1]).write_text(json.dumps(CHECK))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(record.subprocess, "run", run)
    own = tmp_path / "own.json"
    into = tmp_path / "runs.jsonl"
    assert record._run(["check", "--stage", "experts", *(word.format(own) for word in asked)], into) == 0
    assert own.is_file() == bool(asked)
    assert [found["kind"] for found in store.read(into)] == ["check"]


def test_the_result_of_an_older_run_is_not_recorded_for_one_that_found_nothing(tmp_path, monkeypatch):
    from moe_harness.harness.commands import record

    own, into = tmp_path / "own.json", tmp_path / "runs.jsonl"
    own.write_text(json.dumps(CHECK))
    monkeypatch.setattr(record.subprocess, "run", lambda command, **given: subprocess.CompletedProcess(command, 3))
    assert record._run(["check", "--stage", "experts", "--json", str(own)], into) == 3
    assert not into.exists()


def test_a_command_compares_with_what_was_recorded(tmp_path):
    """--baseline: the same run again is no regression, a check that was lost is one."""
    from moe_harness.harness.record.against import against

    file = tmp_path / "runs.jsonl"
    store.append(file, [*line.lines(CHECK), *line.lines(BENCH)])
    assert against(file, [CHECK], 0) == 0
    assert against(file, [CHECK | {"verdict": "fail"}], 0) == 1
    assert against(file, [CHECK], 3) == 3
    store.append(file, line.lines(GATE))
    other = GATE | {"about": {"candidate": {"identity": {"model": "another"}}}}
    assert [against(file, found, 0) for found in (GATE, other)] == [0, 3]
    with pytest.raises(CannotJudge, match="nothing in common"):
        against(file, [CHECK | {"impl": "other"}], 0)
