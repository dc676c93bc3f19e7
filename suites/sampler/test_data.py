"""The data of a case are what its id says: else a fault that shows on such data alone passes."""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.stages.sampler.cases import SPECIALS, SamplerCase
from moe_harness.harness.stages.sampler.stage import FEW_KINDS, STAGE

CASE = SamplerCase(B=60, V=50)


def options(**change: object) -> dict[str, Tensor]:
    return STAGE.build(CASE.but(**change), "cpu").keywords


def logits(**change: object) -> Tensor:
    return STAGE.build(CASE.but(dtype="fp32", **change), "cpu").args["logits"]


def test_temperatures_are_the_one_that_is_named_or_several_with_a_greedy_one() -> None:
    assert options()["temperature"].unique().tolist() == pytest.approx([0.8])
    several = options(temperature=-1.0)["temperature"].unique().tolist()
    assert len(several) == FEW_KINDS and several[0] == 0.0 < several[1] < 1.0 < several[-1]
    assert float(options(data="hot")["temperature"].min()) > 1000
    assert 0 < float(options(data="cold")["temperature"].max()) < 1e-5


@pytest.mark.parametrize(("cut", "given"), [("none", ()), ("k", ("top_k",)), ("p", ("top_p",))])
def test_only_what_cuts_is_given(cut: str, given: tuple[str, ...]) -> None:
    found = options(cut=cut)
    assert tuple(name for name in ("top_k", "top_p") if found[name] is not None) == given


def test_rows_are_cut_by_one_by_the_other_by_both_and_by_none() -> None:
    found = options(cut="rows")
    cuts = {(int(k) >= 1, float(p) < 1) for k, p in zip(found["top_k"], found["top_p"], strict=True)}
    assert cuts == {(False, False), (True, False), (False, True), (True, True)}
    found = options(cut="both")
    assert int(found["top_k"].max()) > 50 and 0 in found["top_k"] and 1 in found["top_k"]
    found = options(cut="edges")
    kept = [int(k) == 1 or float(p) < 0.01 for k, p in zip(found["top_k"], found["top_p"], strict=True)]
    assert kept == [False, False, True, True] * 15 and -1 in found["top_k"] and float(found["top_p"].max()) > 1


@pytest.mark.parametrize("vary", ["seeds", "positions", "grid", "far"])
@pytest.mark.parametrize("ids", ["int64", "int32"])
def test_no_two_rows_draw_at_one_place(vary: str, ids: str) -> None:
    found = options(vary=vary, ids=ids, B=200)
    seeds, positions = found["seeds"].long(), found["positions"].long()
    assert str(found["seeds"].dtype).endswith(ids) and len(torch.stack([seeds, positions]).unique(dim=1).T) == 200
    assert (len(seeds.unique()) > 1, len(positions.unique()) > 1) == (vary != "positions", vary != "seeds")
    far = {"int64": 1 << 60, "int32": 1 << 30}[ids]
    assert bool((seeds > far).all()) is (vary == "far") and bool((positions > 1 << 17).any()) is (vary == "far")


@pytest.mark.parametrize("data", SPECIALS)
def test_logits_are_of_the_kind_that_the_case_names(data: str) -> None:
    found = logits(data=data)
    tops = found.topk(2, 1).values
    is_so = {
        "masked": found.isinf().double().mean() > 0.3 and not found.isinf().all(1).any(),
        "masked_hot": found.isinf().double().mean() > 0.3 and not found.isinf().all(1).any(),
        "ties": len(found.unique()) < 6 and len(found.unique()) > 1, "all_equal": len(found.unique()) == 1,
        "peaked": (found.argmax(1) == 25).all() and (tops[:, 0] - tops[:, 1] > 10).all(),
        "far_down": found.max() < -900, "large": found.min() > 2900,
        "edge_values": set(found.argmax(1).tolist()) == {0, 49},
    }  # fmt: skip
    assert is_so.get(data, torch.equal(found, logits())), "hot and cold are temperatures"


def test_many_draws_come_from_few_distributions() -> None:
    found = logits(data="draws", B=40)
    assert len(found.unique(dim=0)) == FEW_KINDS and torch.equal(found[:4], found[36:])
