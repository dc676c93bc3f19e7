"""The accuracy gate over every way of running the engine: batch sizes, ranks that share experts, each dispatcher.

    python -m moe_harness.suites.accuracy.nightly requests DIR [--limit N]      where lm-eval is
    python -m moe_harness.suites.accuracy.nightly answer DIR [--device cuda]    where the GPUs are; one call
    python -m moe_harness.suites.accuracy.nightly judge DIR                     where lm-eval is
    python -m moe_harness.suites.accuracy.nightly all DIR                       where both are

Between the steps DIR holds JSON lines alone, so it can be carried to a machine without lm-eval and back.  Each way is a
process of its own; what was answered is kept under DIR/ledger, so that the same call goes on after an interruption.
The status is 1 where a way fails, 3 where one could not be run or judged, and 0 where all passed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_harness import fixtures
from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_FAIL, EXIT_PASS, HarnessError

MODEL = Path(fixtures.__file__).parent / "checkpoints" / "arithmetic-moe"
BASELINE, ENGINE = "transformers:eager", "qwen3_moe"
BATCH_SIZES = (1, 2, 3, 4, 8, 64)  # a published bug was there at concurrency 4 and not at 2 and 8
BATCH_SIZE = 64  # of what does not vary it
MARGIN = 0.02


def ways(devices: int) -> Iterator[tuple[str, list[str]]]:
    """Name and options of every way that so many devices can run."""
    for size in BATCH_SIZES:
        yield f"batch-{size}", ["--batch-size", str(size)]
    if devices >= 2:
        yield "tp-2", ["--tp", "2"]
        for spec in registry.registered("dispatcher"):
            name = spec.rpartition(":")[2]
            yield f"ep-2-{name}", ["--ep", "2", "--dispatcher", name]


def requests(folder: Path, limit: int | None) -> int:
    """Write the questions; all of them unless there is a limit."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = ["--task", "arithmetic", *([] if limit is None else ["--limit", str(limit)])]
    return _gate("requests", *asked, "--out", str(folder / "requests.jsonl"))


def answer(folder: Path, device: str, devices: int, seconds: float) -> int:
    """Baseline, then every way; how each ended, and how long it took, in answered.json."""
    shared = [str(folder / "requests.jsonl"), "--model", str(MODEL), "--device", device,
              "--ledger", str(folder / "ledger"), "--timeout", str(seconds)]  # fmt: skip
    plan = [("baseline", BASELINE, []), *((name, ENGINE, options) for name, options in ways(devices))]
    told: dict[str, Any] = {}
    for name, spec, options in plan:
        started = time.monotonic()
        status = _gate("answer", *shared, "--impl", spec, *options, "--out", str(folder / f"{name}.jsonl"))
        told[name] = {"status": status, "seconds": round(time.monotonic() - started, 1), "options": options}
        print(f"{name}: status {status}, {told[name]['seconds']} s", flush=True)
        (folder / "answered.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return EXIT_CANNOT_JUDGE if any(way["status"] for way in told.values()) else EXIT_PASS


def judge(folder: Path) -> int:
    """One line for each way that was to be run; the results lie in judged.json, which `record` and `compare` read."""
    from moe_harness.harness.gate import steps, view

    verdicts, results = [], []
    for name in json.loads((folder / "answered.json").read_text("utf-8")):
        if name == "baseline":
            continue
        try:
            sides = [folder / f"{side}.jsonl" for side in ("requests", "baseline", name)]
            result = steps.make_result(*sides, MARGIN) | {"candidate": f"{ENGINE} {name}"}
            verdicts.append(result["verdict"])
            results.append(result)
            print(f"{name}: {result['verdict']}  {view.summary(result)}")
        except HarnessError as error:
            verdicts.append("error")
            print(f"{name}: not judged: {error}")
    (folder / "judged.json").write_text(json.dumps({"results": results}) + "\n", "utf-8")
    return verdict_status(verdicts)


def verdict_status(verdicts: list[str]) -> int:
    """A failure is one whatever else could not be judged; nothing at all is no pass."""
    if "fail" in verdicts:
        return EXIT_FAIL
    return EXIT_PASS if verdicts and set(verdicts) == {"pass"} else EXIT_CANNOT_JUDGE


def _gate(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "moe_harness", "gate", *arguments]).returncode


def _devices(device: str) -> int:
    """Ranks that this machine can hold; any number on a CPU."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else 2


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moe_harness.suites.accuracy.nightly", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("step", choices=("requests", "answer", "judge", "all"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="so many questions; all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one batch")
    asked = parser.parse_args()
    if asked.step in ("requests", "all") and (status := requests(asked.folder, asked.limit)):
        sys.exit(status)
    status = EXIT_PASS
    if asked.step in ("answer", "all"):
        status = answer(asked.folder, asked.device, _devices(asked.device), asked.timeout)
    if asked.step in ("judge", "all"):  # a way that was not answered is told there
        status = judge(asked.folder)
    sys.exit(status)


if __name__ == "__main__":
    main()
