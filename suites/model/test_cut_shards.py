"""top_k and top_p where the vocabulary lies in shards: the tokens of one rank, and no row is brought together."""

from pathlib import Path

import pytest

from moe_harness.fixtures import checkpoints
from moe_harness.harness.ranks import pool
from moe_harness.suites.model.ranked_tasks import CUT_FAULTS, Cell
from moe_harness.suites.model.test_coverage import TASKS

RANKS, VOCABULARY = 2, 1026  # shards of 516 and 510 tokens
CELL = Cell("qwen3_moe", RANKS, changes={"vocab_size": VOCABULARY})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("cut"), "qwen3_moe", vocab_size=VOCABULARY)


def test_shards_keep_what_a_sort_of_the_whole_row_keeps() -> None:
    outcome = pool.run(f"{TASKS}:cut_rows", {}, ranks=3, seed=5)
    assert outcome.results == [[]] * 3, outcome.failure


def test_requests_with_cuts_get_the_tokens_of_one_rank(folder: Path) -> None:
    first, second = pool.run(f"{TASKS}:cut_tokens", CELL.spec(folder), ranks=RANKS).results
    assert first["spread"] == second["spread"] == first["one"]
    assert first["largest"] < 6 * VOCABULARY / 2 * 8, "as many bytes as a shard of the logits"


@pytest.mark.parametrize("fault", CUT_FAULTS)
def test_a_cut_of_each_shard_alone_is_seen(fault: str, folder: Path) -> None:
    first, _ = pool.run(f"{TASKS}:cut_tokens", CELL.spec(folder) | {"fault": fault}, ranks=RANKS).results
    assert first["spread"] != first["one"]
