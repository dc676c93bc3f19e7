"""What nights of the gate found, kept as data and told as a page.

    python -m moe_harness.suites.accuracy.ways keep DIR --as "two H200s, NCCL"     from DIR/judged.json, to the data
    python -m moe_harness.suites.accuracy.ways page                                the page from the data

The data are docs/gate_ways.json: a night each, with what names the machine, and a row for each way (nightly) with its
verdict and figures, not its answers.  The page is docs/gate_ways.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moe_harness.suites.accuracy.nightly import NULLS, PARTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
DATA, PAGE = DOCS / "gate_ways.json", DOCS / "gate_ways.md"
HEAD = """# Every way of running, through the gate

Written by `python -m moe_harness.suites.accuracy.ways page` from [gate_ways.json](gate_ways.json). Each night is
`python -m moe_harness.suites.accuracy.nightly` (requests, answer, judge), kept by `... ways keep DIR`. All ways answer
the same questions of `arithmetic` as the baseline, `transformers:eager`, with a margin of 2 points; what begins with
`planted` is a fault and has to fail.

- "lost, won": questions that only the baseline, only the candidate answers.
- "greedy tokens": of the worked answers, forced, how many have another likeliest token than under the baseline.
- "gold": the mean shift of the log-likelihood of a worked answer, in nats.
- "quarters": of {parts} drawn quarters of the questions, how many pass, are inconclusive, and fail.
- "falls": of {nulls} comparisons resampled from the pairs, how many the gate calls a fall.
- Seconds are those of one process from its start, beside the others of the night: no measure of speed.
"""


def kept(folder: Path, name: str) -> dict[str, Any]:
    """A night from what `nightly judge` wrote into a folder."""
    results = json.loads((folder / "judged.json").read_text("utf-8"))["results"]
    answered = json.loads((folder / "answered.json").read_text("utf-8"))
    about = results[0]["about"]["baseline"]
    return {
        "name": name, "questions": results[0]["documents"], "baseline": results[0]["baseline"],
        "baseline_device": about["identity"]["device"], "baseline_versions": about["identity"]["versions"],
        "device": results[0]["about"]["candidate"]["identity"]["device"],
        "versions": results[0]["about"]["candidate"]["identity"]["versions"],
        "left_out": {way: told["left_out"] for way, told in answered.items() if "left_out" in told},
        "ways": [_way(result, answered) for result in results],
    }  # fmt: skip


def _way(result: dict[str, Any], answered: dict[str, Any]) -> dict[str, Any]:
    name = result["candidate"].rpartition(" ")[2]
    gold, flips = result["gold_loglikelihood"] or {}, result["flips"]
    return {
        "name": name, "verdict": result["verdict"], "wanted": answered[name].get("wanted", "pass"),
        "accuracy": result["accuracy"], "interval": result["interval"], "p": result["p"],
        "discordant": result["discordant"], "reasons": result["reasons"],
        "invalid": result["invalid"]["candidate"], "gold": gold.get("difference"), "kl": flips.get("kl"),
        "tokens": [flips["tokens"], flips["of_tokens"]] if "tokens" in flips else None,
        "parts": result["parts"], "falls": result["falls_of_resampled"], "seconds": answered[name].get("seconds"),
    }  # fmt: skip


def page(nights: list[dict[str, Any]]) -> str:
    """The page."""
    told = [HEAD.format(parts=PARTS, nulls=NULLS)]
    for night in nights:
        versions = ", ".join(f"{package} {number}" for package, number in night["versions"].items() if number)
        where = (
            "" if night["baseline_device"] == night["device"] else
            f" The baseline was answered on {night['baseline_device']} "
            f"(torch {night['baseline_versions'].get('torch')})."
        )  # fmt: skip
        told.append(
            f"## {night['name']}\n\n{night['questions']} questions, {night['device']}; {versions}.{where}\n\n"
            "| way | verdict | right | lost, won | greedy tokens | gold | quarters | falls | seconds |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        told += [_row(way) for way in night["ways"]]
        for name, why in night["left_out"].items():
            told.append(f"\n`{name}` was left out: {why}.")
        told.append("")
    return "\n".join(told).rstrip("\n") + "\n"


def _row(way: dict[str, Any]) -> str:
    verdict = way["verdict"] if way["verdict"] == way["wanted"] else f"**{way['verdict']}**, wanted {way['wanted']}"
    parts = way["parts"] or {}
    quarters = ", ".join(str(parts.get(verdict, 0)) for verdict in ("pass", "inconclusive", "fail")) if parts else "-"
    tokens = "-" if way["tokens"] is None else f"{way['tokens'][0]} of {way['tokens'][1]:,}"
    gold = "-" if way["gold"] is None else f"{way['gold']:+.2g}"
    lost, won = way["discordant"]
    cells = (
        f"`{way['name']}`", verdict, f"{way['accuracy']['candidate']:.2%}", f"{lost}, {won}", tokens, gold, quarters,
        str(way["falls"]), "-" if way["seconds"] is None else f"{way['seconds']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moe_harness.suites.accuracy.ways", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    steps = parser.add_subparsers(dest="step", required=True)
    keep = steps.add_parser("keep", help="add a judged night to the data, in place of one of the same name")
    keep.add_argument("folder", type=Path)
    keep.add_argument("--as", dest="name", required=True)
    steps.add_parser("page", help="write the page")
    asked = parser.parse_args()
    nights = json.loads(DATA.read_text("utf-8")) if DATA.is_file() else []
    if asked.step == "keep":
        nights = [night for night in nights if night["name"] != asked.name] + [kept(asked.folder, asked.name)]
        DATA.write_text(json.dumps(nights, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(nights), "utf-8")


if __name__ == "__main__":
    main()
