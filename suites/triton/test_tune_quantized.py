"""Tuning of the quantised experts: a log gives the table, the table gives the plan, and every plan compiles or runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_harness.impls.triton import quantized_plans, tune_quantized
from moe_harness.impls.triton._quantized_operands import PACKED
from moe_harness.impls.triton.configs import Shape

SHAPE = Shape(8, 256, 128, 2)
LAYER = tune_quantized.Layer(SHAPE, "fp8_block", True)
CUDA = torch.device("cuda")


def write_log(path: Path, tokens: int, times: dict[tuple[str, str], float]) -> None:
    """50 us each, and for each way and product the last candidate's from `times`."""
    lines = []
    for which, jobs in tune_quantized._jobs(LAYER, tokens).items():
        lines += [json.dumps([tune_quantized._key(tokens, job), 50.0]) for job in jobs[:-1]]
        lines.append(json.dumps([tune_quantized._key(tokens, jobs[-1]), times.get(which, 50.0)]))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A table of two numbers of tokens, where plans are looked up, on a GPU that is not there."""
    monkeypatch.setattr(quantized_plans, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(quantized_plans, "device_name", lambda device: "H")
    quantized_plans.tables.cache_clear()
    quantized_plans.plan_of.cache_clear()
    log = tmp_path / "log.jsonl"
    entries = {}
    for tokens, times in ((4, {("few", "gate_up"): 5.0, ("few", "down"): 4.0}), (512, {("ahead", "gate_up"): 20.0})):
        write_log(log, tokens, times)
        entries |= tune_quantized.tune_quantized(SHAPE, "fp8_block", True, [tokens], log, tmp_path / "part")["entries"]
    content = json.loads((tmp_path / "part").read_text()) | {"entries": entries, "capability": [9, 0]}
    quantized_plans.file_of(CUDA, SHAPE, "fp8_block", True).write_text(json.dumps(content))
    yield content
    quantized_plans.tables.cache_clear()
    quantized_plans.plan_of.cache_clear()


def test_the_fastest_way_is_written_and_found_by_rows_per_expert(table: dict) -> None:
    # 9 slots are nearer to the 8 of the first plan, which goes slot by slot and was not timed with more.
    asked = ((4, 8, "few"), (4, 5, "few"), (512, 9, "ahead"), (512, 1024, "ahead"), (512, 700, "ahead"))
    for tokens, slots, way in asked:
        plan = quantized_plans.plan_of(SHAPE, "fp8_block", slots, True, CUDA)
        last = {product: tune_quantized._jobs(LAYER, tokens)[way, product][-1] for product in ("gate_up", "down")}
        assert (plan.few, plan.ahead) == (way == "few", way == "ahead")
        assert plan.gate_up == last["gate_up"].tiling


@pytest.mark.usefixtures("table")
def test_a_table_serves_its_own_format_treatment_and_sizes_alone() -> None:
    far = replace(SHAPE, experts=128, hidden=4096)
    for shape, format, quantize in (
        (far, "fp8_block", True), (SHAPE, "fp8_block", False), (SHAPE, "mxfp4", False),
        (replace(SHAPE, element_size=4), "fp8_block", True),
    ):  # fmt: skip
        found = quantized_plans.plan_of(shape, format, 1024, quantize, CUDA)
        assert found == quantized_plans.rules(shape, format, 1024, quantize)


def test_every_committed_table_holds_plans_that_its_kernels_take() -> None:
    paths = list(quantized_plans.FOLDER.glob("*.json"))
    if not paths:
        pytest.skip("there is no table yet")
    for path in paths:
        data = json.loads(path.read_text())
        for entry in data["entries"].values():
            plan = quantized_plans.plan_from(entry)
            woven = data["format"] in PACKED and not plan.few
            assert plan.ahead <= (data["quantize"] or woven), path
            assert (
                not data["quantize"] or not plan.ahead or (plan.gate_up.m > 1 if plan.few else plan.gate_up.n == 128)
            ), path


def test_first_products_that_make_codes_are_128_columns_wide() -> None:
    for rows in (32.0, 128.0, 512.0):
        found = list(tune_quantized.candidates(LAYER, "ahead", "gate_up", rows))
        assert found
        assert all(tiling.n == 128 for tiling in found)


def test_a_format_without_codes_of_activations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="should be one of fp8_block, fp8_channel"):
        tune_quantized.tune_quantized(SHAPE, "mxfp4", True, [1], tmp_path / "log")
