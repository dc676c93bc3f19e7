"""Other people's tolerances: the table of wrong outputs that they accept, and messages about bad descriptions."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.proof import audit

GOOD: dict[str, Any] = {
    "name": "ours",
    "rule": {"kind": "allclose", "atol": 1e-2, "rtol": 1e-2},
    "inputs": {"hidden_states": 1.0, "gate_up_proj": 0.1, "down_proj": 0.1, "router_logits": 1.0},
    "shapes": [{"T": 9, "H": 64, "I": 48, "E": 8, "k": 2}],
}


def counts(name: str, *, only: tuple[int, ...] | None = None) -> list[int]:
    """Accepted wrong outputs per shape; a right kernel must pass."""
    described = audit.read(name)
    shapes = described.shapes if only is None else [described.shapes[place] for place in only]
    result = audit.run(audit.checked({**vars(described), "shapes": shapes}, name))
    assert all(entry["right_passes"] for entry in result["shapes"])
    return [len(entry["accepted"]) for entry in result["shapes"]]


def test_vllm() -> None:
    assert counts("vllm", only=(0, 3)) == [12, 7]


def test_sglang_accepts_everything() -> None:
    assert counts("sglang", only=(0, 1)) == [12, 12]


def test_liger_accepts_everything() -> None:
    assert counts("liger") == [12, 12, 12, 12, 11, 12]  # with k = 1 flat weights are right


def test_flashinfer_accepts_half_of_them_and_all_where_hidden_states_are_zero() -> None:
    assert counts("flashinfer", only=(0, 2)) == [5, 12]


def test_flashinfer_accepts_everything_on_small_values() -> None:
    described = vars(audit.read("flashinfer"))
    inputs = {"hidden_states": 1.0, "gate_up_proj": 0.02, "down_proj": 0.02, "router_logits": 1.0}
    shapes = [{"T": 8, "H": 1024, "I": 384, "E": 16, "k": 8}]
    (entry,) = audit.run(audit.checked(described | {"inputs": inputs, "shapes": shapes}, "test"))["shapes"]
    assert len(entry["accepted"]) == 12


def test_rule_of_flash_attention_accepts_nothing() -> None:
    assert counts("flash-attention") == [0, 0]


def test_rule_of_deepgemm_misses_one_element_of_many() -> None:
    result = audit.run(audit.read("deepgemm"))
    assert [entry["accepted"] for entry in result["shapes"]] == [[], ["one_element_off"]]


def test_torch_testing_rejects_a_right_kernel() -> None:
    (entry,) = audit.run(audit.read("torch-testing-bf16"))["shapes"]
    assert not entry["accepted"]
    assert not entry["right_passes"]


@pytest.mark.parametrize(
    ("rule", "accepted"),
    [
        ({"kind": "cosine", "threshold": 1e-3}, {"doubled", "one_row_zeroed"}),
        ({"kind": "frobenius", "threshold": 2.0}, {"all_zeros", "doubled"}),
        ({"kind": "calc_diff", "threshold": 0.3}, {"doubled"}),
        ({"kind": "percentage", "atol": 0.0, "rtol": 0.0, "share": 0.0}, {"all_zeros", "doubled"}),
    ],
)
def test_each_kind_of_rule(rule: dict[str, Any], accepted: set[str]) -> None:
    shapes = [{"T": 2000, "H": 16, "I": 16, "E": 4, "k": 2}]
    (entry,) = audit.run(audit.checked(GOOD | {"rule": rule, "shapes": shapes}, "test"))["shapes"]
    assert accepted <= set(entry["accepted"])
    assert entry["right_passes"]


def test_every_builtin_is_well_formed_and_cites_its_source() -> None:
    assert set(audit.builtin()) == {
        "vllm", "sglang", "liger", "flashinfer", "flash-attention", "deepgemm", "torch-testing-bf16",
    }  # fmt: skip
    for name in audit.builtin():
        assert all(url.startswith("https://") for url in audit.read(name).source)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_own_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    toml = """
        name = "ours"
        rule = { kind = "allclose", atol = 1e-2, rtol = 1e-2 }
        inputs = { hidden_states = 1.0, gate_up_proj = 0.1, down_proj = 0.1, router_logits = 1.0 }
        shapes = [{ T = 9, H = 64, I = 48, E = 8, k = 2 }]
    """
    path.write_text(json.dumps(GOOD) if suffix == ".json" else toml)
    assert audit.read(str(path)) == audit.checked(GOOD, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": {"kind": "allclos"}}, "allclose"),
        ({"rule": {"kind": "cosine", "atol": 1}}, "should have threshold"),
        ({"rule": {"kind": "cosine", "threshold": "small"}}, "threshold in rule cosine is 'small'"),
        ({"rule": "allclose"}, "kind"),
        ({"inputs": {"hidden_states": 1.0}}, "should have hidden_states, gate_up_proj"),
        ({"shapes": []}, "list of T, H, I, E, k"),
        ({"shapes": [7]}, "tables of T, H, I, E, k"),
        ({"shapes": [GOOD["shapes"][0] | {"inputs": {"hidden": 0.0}}]}, "inputs of a shape has"),
        ({"shapes": [{"T": 9, "H": 64, "I": 48, "E": 2, "k": 4}]}, "k is 4"),
        ({"shapes": [{"T": 0, "H": 64, "I": 48, "E": 2, "k": 1}]}, "whole number above 0"),
        ({"dtype": "bf15"}, "bf16"),
        ({"stage": "expert"}, "experts"),
        ({"tolerance": 1}, "tolerance"),
    ],
)
def test_bad_description_is_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        audit.checked(GOOD | change, "mine.toml")


def test_bad_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("broken.toml", "cannot be read"),
        ("list.json", "holds list"),
        ("none.toml", "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            audit.read(str(tmp_path / name))
    with pytest.raises(UsageError, match="sglang"):
        audit.read("sglan")


def test_missing_field_is_told() -> None:
    with pytest.raises(UsageError, match="lacks the field 'rule'"):
        audit.checked({k: v for k, v in GOOD.items() if k != "rule"}, "mine.toml")
