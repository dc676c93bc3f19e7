"""Nights that are kept: the page is that of the data, and a row tells what the judgement of its way told."""

import json

from moe_harness.harness.gate.judging import judge
from moe_harness.harness.gate.task import STRICT
from moe_harness.suites.accuracy import ways
from moe_harness.suites.accuracy.test_nightly import side


def night(folder):
    """One way that passes, one that should have failed, one that was left out."""
    about = {"identity": {"device": "NVIDIA H200", "versions": {"torch": "2.11.0"}}}
    results = []
    for name, lost in (("tp-2", ()), ("planted-fault", (3,))):
        result = judge("arithmetic", STRICT, side(40), side(40, lost), 0.02)
        result |= {
            "candidate": f"qwen3_moe {name}",
            "parts": {"pass": 20} if not lost else None,
            "falls_of_resampled": 0,
        }
        results.append(result | {"about": {"baseline": about, "candidate": about}})
    (folder / "judged.json").write_text(json.dumps({"results": results}))
    answered = {
        "baseline": {"status": 0}, "tp-2": {"status": 0, "seconds": 12.3, "wanted": "pass"},
        "planted-fault": {"status": 0, "wanted": "fail"}, "ep-2-deepep": {"left_out": "it is not installed"},
    }  # fmt: skip
    (folder / "answered.json").write_text(json.dumps(answered))
    return ways.kept(folder, "a night")


def test_a_way_is_told_with_its_verdict_its_losses_and_what_was_left_out(tmp_path):
    """40 questions decide nothing."""
    page = ways.page([night(tmp_path)])
    assert "40 questions, NVIDIA H200; torch 2.11.0." in page
    assert "| `tp-2` | **inconclusive**, wanted pass | 100.00% | 0, 0 | - | - | 20, 0, 0 | 0 | 12 |" in page
    assert "| `planted-fault` | **inconclusive**, wanted fail | 97.50% | 1, 0 | - | - | - | 0 | - |" in page
    assert "`ep-2-deepep` was left out: it is not installed." in page


def test_the_page_is_that_of_the_data():
    nights = json.loads(ways.DATA.read_text("utf-8"))
    assert ways.page(nights) == ways.PAGE.read_text("utf-8")
    assert all(way["verdict"] == way["wanted"] for night in nights for way in night["ways"])
