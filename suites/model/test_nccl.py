"""The model over ranks on GPUs, one each, over NCCL: the coverage list, graphs of whole steps, the command.

    tox -e multigpu

Each cell of the coverage list runs as on the CPU, in fp64 on the plain kernels: logits, routing and tokens of every
rank are those of one rank.  Then on Triton's kernels in fp32: logits within the bound of rounding, tokens in CUDA
graphs equal to those of the same steps called, on every rank, and to those of one rank.
"""

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.launch import Launched
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.reference.model import Model as Reference
from moe_harness.suites.dispatcher.subjects import GPU_WORLDS
from moe_harness.suites.model.ranked_tasks import IDS, Cell
from moe_harness.suites.model.test_coverage import PROMISED, check_cell, ep

TASKS, GRAPHED = "moe_harness.suites.model.ranked_tasks", "moe_harness.suites.model.graphed_tasks"
ROOT = Path(__file__).resolve().parents[2]
COMPILING = 240.0  # seconds that a task may take with all kernels to compile
ENDED = 5.0  # seconds after the death of a rank in which the others have given their GPUs back

SPREAD = {name: cell for name, cell in PROMISED.items() if cell.ranks > 1}
# What is run in graphs: cut experts and each dispatcher, sums by NCCL and through symmetric memory.
WAYS: dict[str, dict[str, Any]] = {
    "cut experts": {"symmetric": False}, "cut experts, symmetric sums": {"symmetric": True},
    "local_allreduce": ep("local_allreduce", symmetric=False),
    "local_allreduce, symmetric sums": ep("local_allreduce", symmetric=True),
    "naive": ep("naive"), "allgather_reducescatter": ep("allgather_reducescatter"),
    "masked, symmetric sums": ep("masked", symmetric=True), "symmetric": ep("symmetric"),
    "local_allreduce, redundant experts": ep("local_allreduce", copies=3),
}  # fmt: skip
COUNTING = ("all_to_all", "all_to_all_dedup")  # their sizes are read back to the host: no graph holds them
FAMILIES = ("qwen2_moe", "qwen3", "qwen3_omni_moe_talker_text", "deepseek_v2", "deepseek_v2_lite")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny checkpoint of a family and changes of its config, made once."""

    @cache
    def make(family: str, changes: tuple[tuple[str, Any], ...]) -> Path:
        return checkpoints.make(tmp_path_factory.mktemp("model"), family, dtype=torch.float32, **dict(changes))

    return lambda cell: make(cell.family, tuple(cell.changes.items()))


def run(task: str, cell: Cell, folders: Any) -> list[Any]:
    spec = cell.spec(folders(cell)) | {"device": "cuda"}
    outcome = pool.run(task, spec, ranks=cell.ranks, backend="nccl", budget=COMPILING)
    assert outcome.ok, f"{outcome.failure and outcome.failure.headline()}\n{outcome.failure and outcome.failure.trace}"
    return outcome.results


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.multigpu(n=cell.ranks)) for name, cell in SPREAD.items()]
)
def test_a_cell_equals_one_rank(name: str, folders: Any) -> None:
    check_cell(run(f"{TASKS}:cell", SPREAD[name], folders), SPREAD[name])


@pytest.mark.parametrize("way", [*WAYS, *COUNTING])
@pytest.mark.parametrize("world", GPU_WORLDS)
def test_graphs_give_the_tokens_of_calls_and_of_one_rank(way: str, world: int, folders: Any) -> None:
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16} if world > 2 else {}
    cell = Cell("qwen3_moe", world, WAYS.get(way) or (ep(way) if way in COUNTING else {}), changes, dtype="fp32")
    check_graphs(run(f"{GRAPHED}:compared", cell, folders), cell, graphs=way not in COUNTING)


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize("options", [{"symmetric": False}, {}, ep("local_allreduce")], ids=["nccl", "cut", "ep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_graphs(family: str, options: dict[str, Any], folders: Any) -> None:
    cell = Cell(family, 2, options, dtype="fp32")
    check_graphs(run(f"{GRAPHED}:compared", cell, folders), cell)


def check_graphs(found: list[dict[str, Any]], cell: Cell, graphs: bool = True) -> None:
    """Tokens of all ranks and ways are equal, graphs were there, logits are within the bound and equal on all ranks."""
    one = found[0]["one"]
    assert len({told["digest"] for told in found}) == 1, "ranks have different logits"
    assert one["greedy"] != one["drawn"], "nothing is drawn"
    for rank, told in enumerate(found):
        assert bool(told["graphed"]["graphs"]) is graphs and not told["called"]["graphs"], told["graphed"]["graphs"]
        for kind in ("greedy", "drawn"):
            assert told["graphed"][kind] == told["called"][kind], f"rank {rank}: {kind} tokens differ in graphs"
            assert told["graphed"][kind] == one[kind], f"rank {rank}: {kind} tokens differ from those of one rank"
    keys = checkpoints.config(cell.family, **cell.changes)
    weights = checkpoints.tensors(keys, dtype=torch.float32)
    bound = logit_bound(Reference(keys, weights), torch.tensor(IDS), torch.float32)
    assert bound.routed.double().mean() >= 0.5
    logits = torch.tensor(found[0]["logits"], dtype=torch.float64)
    assert bound.z(logits)[bound.routed].abs().max() <= bounds.max_limit()


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_replay_gives_the_bits_of_the_calls(way: str, dtype: str, folders: Any) -> None:
    cell = Cell("qwen3_moe", 2, WAYS[way], dtype=dtype)
    assert run(f"{GRAPHED}:replayed_logits", cell, folders) == [[], []]


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize("options", [(), ("--ep",), ("--ep", "--dispatcher", "symmetric")], ids=" ".join)
def test_the_command_gives_the_tokens_of_one_gpu(options: tuple[str, ...], folders: Any, tmp_path: Path) -> None:
    """Started by the command and by torchrun, whose ranks have to end in an orderly way with graphs of collectives."""
    folder, target = folders(Cell("qwen3_moe", 2)), tmp_path / "out.json"
    generate = ["generate", "--model", str(folder), "--ids", "1,2,3", "--ids", "7", "--max-new-tokens", "8"]
    generate += ["--ignore-eos", "--dtype", "fp32", "--device", "cuda", "--json", str(target)]
    command = [sys.executable, "-m", "moe_harness"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "moe_harness",
    ]
    found = []
    for started in ([*command, *generate], [*command, *generate, "--tp", "2", *options],
                    [*torchrun, *generate, *options]):  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert said.returncode == 0, said.stderr[-3000:]
        found.append(json.loads(target.read_text())["tokens"])
    assert found[0] == found[1] == found[2]


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["nccl", "symmetric"])
def test_a_rank_that_dies_in_the_middle_is_named_and_the_others_end(
    options: dict[str, Any], folders: Any, tmp_path: Path, record_property: Any
) -> None:  # fmt: skip
    """In a graph, where nothing that waits on a GPU can be asked: the others are ended from outside."""
    cell = Cell("qwen3_moe", 2, options, dtype="fp32")
    spec = cell.spec(folders(cell)) | {"device": "cuda", "died": str(tmp_path / "died")}
    with (
        pytest.raises(CannotJudge, match=r"rank 1 of 2 was killed by signal 9 \(SIGKILL\)"),
        Launched(f"{TASKS}:dies", spec, ranks=2, cuda=True) as started,
    ):
        for _ in started.words():
            pass
    seconds = time.time() - float((tmp_path / "died").read_text())
    record_property("seconds", seconds)
    print(f"all ranks had ended {seconds:.2f} s after the death of one")
    assert not any(process.is_alive() for process in started.processes)
    assert seconds < ENDED


def test_the_tasks_themselves_on_gloo(folders: Any) -> None:
    """Called and not replayed: what is expected of GPUs is expected here too."""
    cell = Cell("qwen3_moe", 2, ep("allgather_reducescatter"), dtype="fp32")
    spec = cell.spec(folders(cell))
    outcome = pool.run(f"{GRAPHED}:compared", spec, ranks=2)
    assert outcome.ok, outcome.failure
    check_graphs(outcome.results, cell, graphs=False)
    assert pool.run(f"{GRAPHED}:replayed_logits", spec, ranks=2).results == [[], []]
