"""Calls over ranks: what a user sees of them, and what becomes of the others where one rank fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.ranks import launch, pool
from moe_harness.harness.ranks.launch import Launched
from moe_harness.impls.qwen3_moe import ranks
from moe_harness.impls.qwen3_moe.ranks import RankLost, Ranks
from moe_harness.suites.model.ranked_tasks import Cell
from moe_harness.suites.model.test_bisect import call

TASKS = "moe_harness.suites.model.ranked_tasks"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("model"), "qwen2_moe")


def test_generate_gives_the_tokens_of_one_rank(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    common = ("generate", "--model", str(folder), "--max-new-tokens", "4", "--ignore-eos", "--dtype", "fp32")
    common = (*common, "--json", str(target), "--ids", "1,2,3", "--device", "cpu")
    assert call(*common)[0] == 0
    one = json.loads(target.read_text())["tokens"]
    code, out = call(*common, "--tp", "2")
    assert code == 0 and json.loads(target.read_text())["tokens"] == one
    assert " ".join(map(str, one[0])) in out
    code, out = call(*common, "--ids", "7", "--tp", "2", "--ep", "--dispatcher", "all_to_all")
    assert code == 0 and json.loads(target.read_text())["tokens"][0] == one[0]
    assert "--- 1" in out


def test_generate_runs_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """Its ranks are taken as they are; only the first one says anything."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "moe_harness"]
    options = ["generate", "--model", str(folder), "--ids", "1,2,3", "--max-new-tokens", "3", "--device", "cpu", "--ep"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    assert len(said.stdout.split()) == 3 and "over 2 ranks" in said.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--ep",), "give --tp N with N above 1"), (("--tp", "2", "--dispatcher", "naive"), "give --ep too"),
     (("--tp", "3"), "num_attention_heads is 4, wanted a multiple of the 3 ranks"),
     (("--tp", "2", "--ep", "--dispatcher", "nope"), "wanted one of naive, local_allreduce")],
)  # fmt: skip
def test_a_wrong_call_over_ranks_says_what_to_do(options: tuple[str, ...], message: str, folder: Path) -> None:
    code, out = call("generate", "--model", str(folder), "--ids", "1", "--device", "cpu", *options)
    assert code == 2 and message in out, out


@pytest.mark.parametrize(
    ("task", "message"),
    [("dies", r"rank 1 of 2 was killed by signal 9 \(SIGKILL\); the other ranks were ended"),
     ("complains", r"rank 1 of 2 raised KeyError: 'nothing of the kind'; the other ranks were ended")],
)  # fmt: skip
def test_the_rank_that_fails_is_named_and_nothing_is_left(
    task: str, message: str, folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    spec = Cell("qwen2_moe", 2).spec(folder) | {"died": str(tmp_path / "died")}
    with (
        pytest.raises(CannotJudge, match=message),
        Launched(f"{TASKS}:{task}", spec, ranks=2, cuda=False) as started,
    ):
        for _ in started.words():
            pass
    assert not any(process.is_alive() for process in started.processes)
    assert not Path(started.folder).exists()


def test_a_collective_that_fails_names_the_rank_that_is_gone() -> None:
    """A zombie counts as gone: who started it may never look at it again."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size, ranks.processes = 0, 2, [[7, os.getpid()], [7, gone.pid]]
    with pytest.raises(RankLost, match=rf"rank 1 \(process {gone.pid}\) of 2 has ended"), ranks.naming_the_lost():
        raise RuntimeError("Connection closed by peer")
    gone.wait()
    ranks.processes = [[7, os.getpid()], [8, gone.pid]]  # of another host nothing is known
    with pytest.raises(RuntimeError, match="Connection closed by peer"), ranks.naming_the_lost():
        raise RuntimeError("Connection closed by peer")


def test_ranks_that_are_given_other_prompts_say_so(folder: Path) -> None:
    outcome = pool.run(f"{TASKS}:other_prompts", Cell("qwen2_moe", 2).spec(folder), ranks=2)
    assert outcome.ok, outcome.failure
    assert all("generate of rank 1 differ from those of rank 0" in told for told in outcome.results)


@pytest.mark.parametrize(("gpus", "backend"), [(0, "refused"), (1, "gloo"), (2, "nccl"), (8, "nccl")])
def test_ranks_that_have_no_gpu_each_share_one_over_gloo(
    gpus: int, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nccl refuses two ranks on one GPU; who asked is told that the times mean nothing."""
    joined: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.append(("device", device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **_: joined.append((name, 0)))
    if backend == "refused":
        with pytest.raises(CannotJudge, match="there is none"):
            launch._join(True, 0, 2)
        return
    for rank in range(2):
        launch._join(True, rank, 2)
    assert joined == [("device", 0), (backend, 0), ("device", 1 % gpus), (backend, 0)]
    assert capsys.readouterr().err.count("2 ranks share 1 GPU over gloo") == (backend == "gloo")


def test_sums_through_the_host_are_no_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, capturable in (("gloo", False), ("nccl", True)):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda group: 0)
        monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 1)
        monkeypatch.setattr(ranks.dist, "get_backend", lambda group, name=backend: name)
        monkeypatch.setattr(ranks, "all_gather", lambda found, own, group: found.copy_(own))
        assert Ranks(None, torch.device("cpu")).capturable is capturable  # type: ignore[arg-type]
