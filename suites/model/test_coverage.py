"""The coverage list: every family and layout that is promised, over gloo, each equal to the model on one rank.

A cell is teacher-forced first (logits of the same tokens), then end to end (greedy and drawn tokens of prompts of
several lengths in chunks and batches).  A cell that is missing, refused or skipped fails.
"""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.suites.model.ranked_tasks import IDS, Cell

TASKS = "moe_harness.suites.model.ranked_tasks"
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def ep(dispatcher: str, **options: Any) -> dict[str, Any]:
    return {"expert_parallel": True, "dispatcher": dispatcher, **options}


PROMISED = {
    "Qwen3-MoE TP 1, EP off": Cell("qwen3_moe", 1),
    "Qwen3-MoE TP 2, EP off": Cell("qwen3_moe", 2),
    "Qwen3-MoE TP 2 EP 2 local_allreduce": Cell("qwen3_moe", 2, ep("local_allreduce")),
    "Qwen3-MoE TP 2 EP 2 allgather_reducescatter": Cell("qwen3_moe", 2, ep("allgather_reducescatter")),
    "Qwen3-MoE TP 2 EP 2 naive": Cell("qwen3_moe", 2, ep("naive")),
    "Qwen3-MoE TP 2 EP 2 all_to_all": Cell("qwen3_moe", 2, ep("all_to_all")),
    "Qwen3-MoE TP 2 EP 2 deduplicated": Cell("qwen3_moe", 2, ep("all_to_all_dedup")),
    "Qwen3-MoE TP 2 EP 2 masked": Cell("qwen3_moe", 2, ep("masked")),
    "Qwen3-MoE TP 4 EP 4": Cell("qwen3_moe", 4, ep("local_allreduce")),
    "Qwen3-MoE TP 8 EP 8, 4 key heads": Cell("qwen3_moe", 8, ep("local_allreduce"), HEADS),
    "Qwen3-MoE TP x EP local_allreduce": Cell("qwen3_moe", 4, ep("local_allreduce", expert_shards=2)),
    "Qwen3-MoE TP x EP all_to_all": Cell("qwen3_moe", 4, ep("all_to_all", expert_shards=2)),
    "Qwen3-MoE DP attention x EP 2": Cell("qwen3_moe", 2, ep("all_to_all", data_parallel=True)),
    "Qwen2-MoE DP attention x EP 4, uneven": Cell(
        "qwen2_moe", 4, ep("allgather_reducescatter", data_parallel=True), {"num_experts": 7}
    ),
    "Qwen3-MoE redundant experts": Cell("qwen3_moe", 2, ep("all_to_all", copies=3)),
    "Qwen3-MoE uneven experts and vocabulary": Cell(
        "qwen3_moe", 2, ep("all_to_all"), {"num_experts": 7, "vocab_size": 130}
    ),
    "Qwen3-MoE tied head": Cell("qwen3_moe", 2, {}, {"tie_word_embeddings": True}),
    "dense Qwen3 TP 2 with graphs": Cell("qwen3", 2, {"graphs": True}),
    "dense Qwen3 TP 2, EP asked for": Cell("qwen3", 2, ep("local_allreduce")),
    "DeepSeek-V2-Lite TP 2": Cell("deepseek_v2_lite", 2),
    "DeepSeek-V2 TP 2 EP 2": Cell("deepseek_v2", 2, ep("all_to_all")),
    "Qwen2-MoE TP 2, shared expert and gate": Cell("qwen2_moe", 2),
    "Qwen2-MoE TP 2 EP 2 local_allreduce": Cell("qwen2_moe", 2, ep("local_allreduce")),
    "Qwen2-MoE TP 2 EP 2 allgather_reducescatter": Cell("qwen2_moe", 2, ep("allgather_reducescatter")),
    "talker TP 2, shared expert summed once": Cell("qwen3_omni_moe_talker_text", 2),
    "talker TP 2 EP 2": Cell("qwen3_omni_moe_talker_text", 2, ep("local_allreduce")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny checkpoint of a cell, made once for each family and config."""

    @cache
    def make(family: str, changes: tuple[tuple[str, Any], ...]) -> Path:
        return checkpoints.make(tmp_path_factory.mktemp("model"), family, dtype=torch.float32, **dict(changes))

    return lambda cell: make(cell.family, tuple(cell.changes.items()))


def run(task: str, cell: Cell, folders: Any) -> pool.JobOutcome:
    outcome = pool.run(f"{TASKS}:{task}", cell.spec(folders(cell)), ranks=cell.ranks)
    assert outcome.ok, f"{outcome.failure and outcome.failure.headline()}\n{outcome.failure and outcome.failure.trace}"
    return outcome


@pytest.mark.parametrize("name", PROMISED)
def test_a_cell_equals_one_rank(name: str, folders: Any) -> None:
    cell = PROMISED[name]
    found = run("cell", cell, folders).results
    check_cell(found, cell)
    dense = cell.family == "qwen3"
    assert {told["backend"] for told in found} == {"disabled" if dense else cell.options.get("dispatcher", "disabled")}


def check_cell(found: list[dict[str, Any]], cell: Cell) -> None:
    """Logits, routing and tokens of every rank are those of one rank, and pad rows read no expert."""
    one, shards = found[0]["one"], cell.options.get("expert_shards", 1)
    sequences = cell.ranks if cell.options.get("data_parallel") else 1  # that the padded step of all ranks holds
    assert found[0]["error"] <= bounds.SAME_IN_FP64, "logits differ from those of one rank"
    assert len({told["digest"] for told in found}) == 1, "ranks have different logits"
    for told in found:
        assert told["greedy"] == one["greedy"], "greedy tokens differ from those of one rank"
        assert told["drawn"] == one["drawn"], "drawn tokens differ from those of one rank"
    assert one["greedy"] != one["drawn"], "nothing is drawn"
    check_routing([told["chosen"] for told in found], one["chosen"], shards)
    live = [told["live"] for told in found]
    everywhere = not cell.options.get("expert_parallel")
    right = set(live) == {one["live"]} if everywhere else sum(live) == sequences * shards * one["live"]
    assert right, "pad rows read experts"


def test_symmetric_memory_gives_the_bits_of_a_gather_and_a_scattered_sum(folders: Any) -> None:
    """Its kernels interpreted, in fp32: they take no fp64, and the sum of two ranks has one order."""
    wanted, found = (
        run("few_tokens", Cell("qwen3_moe", 2, ep(name), dtype="fp32"), folders).results
        for name in ("allgather_reducescatter", "symmetric")
    )
    assert found == wanted


def check_routing(chosen: list[list[Any]], one: list[Any], shards: int) -> None:
    """Each layer's choice: equal on all ranks, or each its share of the tokens, equal on those that share experts."""
    for layer, wanted in enumerate(one):
        parts = [rank[layer] for rank in chosen]
        runs = [parts[first : first + shards] for first in range(0, len(parts), shards)]
        shared_out = sum((run[0] for run in runs), []) == wanted and all(part == run[0] for run in runs for part in run)
        assert shared_out or all(part == wanted for part in parts), f"layer {layer} routes otherwise"


def moved(calls: list[RecordedCall]) -> Counter[tuple[str, float]]:
    """How often which sum moved how many bytes, under the names of all versions of torch."""
    kinds = {call.op: "scattered" if call.op.startswith("reduce_scatter") else call.op for call in calls}
    return Counter((kinds[call.op], call.sent) for call in calls if call.reduce == "SUM")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3"])
@pytest.mark.parametrize("dispatcher", ["none", "local_allreduce", "allgather_reducescatter", "all_to_all"])
def test_one_reduction_after_attention_and_one_after_the_experts(family: str, dispatcher: str, folders: Any) -> None:
    """Counted with their bytes: a ring's 2 (R-1)/R of [T, H] for a sum everywhere, half of it for a scattered one.

    One more, of the embedding, comes before the first layer; what an all_to_all brings back is summed where it arrives.
    """
    cell = Cell(family, 2, {} if dispatcher == "none" else ep(dispatcher))
    outcome = run("forward", cell, folders)
    keys = checkpoints.config(family)
    tokens, layers, size = len(IDS) * len(IDS[0]), keys["num_hidden_layers"], 8
    everywhere = 2 * (cell.ranks - 1) / cell.ranks * tokens * keys["hidden_size"] * size
    wanted = Counter({("all_reduce", everywhere): 1 + layers})
    if family == "qwen3" or dispatcher in ("none", "local_allreduce"):
        wanted["all_reduce", everywhere] += layers
    elif dispatcher == "allgather_reducescatter":
        wanted["scattered", everywhere / 2] += layers
    for before, calls in zip(outcome.results, outcome.traces, strict=True):
        assert moved(calls[before:]) == wanted
