"""Tuning keeps every timing: a run that was stopped goes on from its log, and the fastest candidates are written."""

import json
from pathlib import Path

import pytest

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.impls.triton import configs, tune

SHAPE = configs.Shape(8, 64, 32, 2)


def candidates(tokens: int) -> list[tuple[str, object]]:
    """What is timed at a number of tokens."""
    rows = tokens * SHAPE.top_k / SHAPE.experts
    kinds = ["walk"] * (tokens <= 8) + ["gate_up", "down"] * (tokens >= 4)
    return [(kind, how) for kind in kinds for how in tune.candidates(kind, rows)]


def write_log(path: Path, tokens: int, times: dict[str, float], leave_out: int = 0) -> None:
    """A log of made-up timings: 50 us each, and for each kind the last candidate's from `times`."""
    known = candidates(tokens)
    last = dict(known)
    lines = [
        json.dumps([tune._key(kind, tokens, how), times[kind] if how == last[kind] else 50.0]) for kind, how in known
    ]
    path.write_text("".join(line + "\n" for line in lines[: len(lines) - leave_out]))


def test_a_whole_log_gives_the_file_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, out = tmp_path / "log", tmp_path / "tuned.json"
    write_log(log, 64, {"gate_up": 20.0, "down": 10.0})
    content = tune.tune(SHAPE, [64], log, out)
    told = capsys.readouterr().out
    assert f"0 of {len(candidates(64))} timings to do" in told and f"wrote {out}" in told
    assert json.loads(out.read_text()) == content
    last = dict(candidates(64))
    assert configs.entry_from(content["entries"]["64"]) == configs.Entry(None, last["gate_up"], last["down"])


def test_a_stopped_run_says_so_and_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_harness.harness.commands.tune import tune as command

    log = tmp_path / "log"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    wanted: list[int] = []

    def stop(shape: configs.Shape, jobs: list, processes: int) -> None:
        wanted.append(len(jobs))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "compile_all", stop)
    two = [configs.Tiling(16, 32, 64), configs.Tiling(16, 64, 64)]
    monkeypatch.setattr(tune, "candidates", lambda kind, rows: iter(two))
    for done in (0, 3):
        keys = [tune._key(kind, 64, how) for kind in ("gate_up", "down") for how in tune.candidates(kind, 1.0)]
        log.write_text("".join(json.dumps([key, 5.0]) + "\n" for key in keys[:done]))
        with pytest.raises(CannotJudge, match=f"stopped: {done} timings are in .*goes on from there"):
            command(tokens="64", log=log, out=tmp_path / "out", ep_size=1, config="qwen3-30b-a3b", processes=1)
    assert wanted == [4, 1] and not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_times_only_what_is_missing(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "tuned.json"
    tune.tune(SHAPE, [1], log, out, processes=2)
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(candidates(1)))
    log.write_text("\n".join(lines[:-2]) + "\n")
    again = tune.tune(SHAPE, [1], log, out, processes=2)
    assert log.read_text().splitlines()[:-2] == lines[:-2] and len(log.read_text().splitlines()) == len(lines)
    assert configs.entry_from(again["entries"]["1"]).walk is not None
