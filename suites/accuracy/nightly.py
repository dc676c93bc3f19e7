"""The accuracy gate over every way of running the engine: batch sizes, ranks that share experts, each dispatcher.

    python -m moe_harness.suites.accuracy.nightly requests DIR [--limit N]      where lm-eval is
    python -m moe_harness.suites.accuracy.nightly answer DIR [--device cuda]    where the GPUs are; one call
    python -m moe_harness.suites.accuracy.nightly judge DIR                     where lm-eval is
    python -m moe_harness.suites.accuracy.nightly all DIR                       where both are

Between the steps DIR holds JSON lines alone, so it can be carried to a machine without lm-eval and back.  Each way is a
process of its own; what was answered is kept under DIR/ledger, so that the same call goes on after an interruption.
Ways of one process are spread over the GPUs there are; ranks that have no GPU each share one, over gloo.  All ways but
the planted faults, which have to fail,
compute the same, so that each is a null comparison: it is resampled NULLS times, and no more than the nominal share may
be called a fall.  Where a quarter of the questions is as many as
decide, the verdicts on PARTS drawn quarters are told too: a right implementation passes on all.

The status is 1 where a way fails, 3 where one could not be run or judged, and 0 where all passed; what this machine has
no hardware or library for is left out, told by name, and counts as neither.
"""

import argparse
import collections
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from moe_harness import fixtures
from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_FAIL, EXIT_PASS, HarnessError

MODEL = Path(fixtures.__file__).parent / "checkpoints" / "arithmetic-moe"
ENGINE, TRANSFORMERS = "qwen3_moe", "transformers:"
COLLAPSED = Path(__file__).with_name("collapsed.py")
BATCH_SIZES = (1, 2, 3, 4, 8, 64)  # a published bug was there at concurrency 4 and not at 2 and 8
OTHERS = (f"{TRANSFORMERS}grouped_mm", f"{TRANSFORMERS}batched_mm", "torch:loop", "torch:batched")  # right ones
SLOTS = "moe_harness.harness.stages.experts.faults.slots"
PLANTED = (f"{SLOTS}:gate_up_swapped", f"{SLOTS}:ids_sorted_without_weights")  # published collapses of one device
MARGIN = 0.02
NULLS = 200
PARTS = 20
DECIDES = 133  # questions of which none is lost
WORLDS = (2, 4, 8)  # ranks
GPU_EACH = ("symmetric", "deepep")  # dispatchers whose ranks cannot share a GPU


class Way(NamedTuple):
    """One way of answering.

    Attributes:
        left_out: what this machine lacks for it.
        wanted: the verdict that it has to get.
        form: "shared", which has a shared expert, or "wide", whose heads are enough for eight ranks; None for the model
            as it is.
    """

    name: str
    spec: str
    options: list[str]
    left_out: str | None = None
    wanted: str = "pass"
    form: str | None = None  # of the model: the file of fixtures/arithmetic that writes the same function so

    @property
    def spread(self) -> bool:
        """Whether it runs over several ranks."""
        return "--tp" in self.options or "--ep" in self.options


def ways(device: str, devices: int) -> Iterator[Way]:
    """Every way, the baseline first, for a machine with so many GPUs."""
    yield Way("baseline", f"{TRANSFORMERS}eager", [])
    for size in BATCH_SIZES:
        yield Way(f"batch-{size}", ENGINE, ["--batch-size", str(size)])
    triton = None if device == "cuda" else "Triton's kernels need a GPU"
    yield Way("transformers-triton", f"{TRANSFORMERS}moe_harness_triton", [], triton)
    for spec in OTHERS:
        yield Way(spec.replace(":", "-"), spec, [])
    for spec in PLANTED:
        yield Way(f"planted-{spec.rpartition(':')[2]}", spec, [], wanted="fail")
    yield Way("tp-2", ENGINE, ["--tp", "2"])
    for fault in ("experts_summed_twice", "never_summed"):
        yield Way(f"planted-{fault}", f"{COLLAPSED}:{fault}", ["--tp", "2"], wanted="fail")
    yield Way("shared-expert", ENGINE, [], form="shared")
    yield Way("tp-2-shared-expert", ENGINE, ["--tp", "2"], form="shared")
    fault = "shared_expert_summed"
    yield Way(f"planted-{fault}", f"{COLLAPSED}:{fault}", ["--tp", "2"], wanted="fail", form="shared")
    # The engine's own dispatchers; others are judged by the stage dispatcher.
    own = [spec.partition(":")[2] for spec in registry.registered("dispatcher") if spec.startswith("dispatchers:")]
    for ranks in WORLDS:
        form = None if ranks == 2 else "wide"
        if ranks > 2:
            yield Way(f"tp-{ranks}", ENGINE, ["--tp", str(ranks)], _lacking(None, ranks, devices), form=form)
        for name in own:
            options = ["--ep", str(ranks), "--dispatcher", name]
            yield Way(f"ep-{ranks}-{name}", ENGINE, options, _lacking(name, ranks, devices), form=form)


def _lacking(dispatcher: str | None, ranks: int, devices: int) -> str | None:
    if dispatcher in GPU_EACH and devices < ranks:
        return f"its {ranks} ranks need a GPU each, and there {_are(devices)}"
    cores = os.cpu_count() or 1
    if devices and ranks > 2 * devices:
        return f"no more than two ranks share a GPU: {ranks} ranks would need {ranks // 2}, and there {_are(devices)}"
    if not devices and ranks > max(2, cores):
        return f"no more ranks than cores, and for {ranks} ranks there are {cores}"
    if dispatcher == "deepep" and find_spec("deep_ep") is None:
        return "deep_ep is not installed"
    return None


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count}"


def requests(folder: Path, limit: int | None) -> int:
    """Write the questions; all of them unless there is a limit."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = ["--task", "arithmetic", *([] if limit is None else ["--limit", str(limit)])]
    command = [sys.executable, "-m", "moe_harness", "gate", "requests"]
    return subprocess.run([*command, *asked, "--out", str(folder / "requests.jsonl")]).returncode


def answer(
    folder: Path, device: str, planned: Collection[Way], seconds: float, jobs: int = 1, gpus: Sequence[str] = ()
) -> int:
    """Every way; how each ended, and how long it took, in answered.json, which tells of those that have ended so far.

    Args:
        gpus: names of GPUs, over which ways of one process are spread; ways over ranks see all of them.
    """
    asked = [str(folder / "requests.jsonl"), "--device", device, "--ledger", str(folder / "ledger"),
             "--timeout", str(seconds)]  # fmt: skip
    models = {form: _written(form, folder) for form in {way.form for way in planned if way.left_out is None}}
    turns = itertools.cycle(gpus)

    def one(way: Way, gpu: str | None) -> dict[str, Any]:
        if way.left_out is not None:
            print(f"{way.name}: left out: {way.left_out}", flush=True)
            return {"left_out": way.left_out}
        started, file = time.monotonic(), folder / f"{way.name}.jsonl"
        spec = ["--model", str(models[way.form]), "--impl", way.spec, *way.options]
        status = _answer(*asked, *spec, "--out", str(file), gpu=gpu)
        ended = {"status": status, "seconds": round(time.monotonic() - started, 1), "spec": way.spec,
                 "options": way.options, "wanted": way.wanted}  # fmt: skip
        print(f"{way.name}: status {status}, {ended['seconds']} s", flush=True)
        return ended

    told: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        under_way = {pool.submit(one, way, None if way.spread else next(turns, None)): way.name for way in planned}
        for ended in as_completed(under_way):
            told[under_way[ended]] = ended.result()
            ordered = {way.name: told[way.name] for way in planned if way.name in told}
            (folder / "answered.json").write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    return EXIT_CANNOT_JUDGE if any(way.get("status") for way in told.values()) else EXIT_PASS


def _written(form: str | None, folder: Path) -> Path:
    """The model in a form, written beside the answers."""
    if form is None:
        return MODEL
    out = folder / f"{form}-moe"
    import_module(f"{fixtures.__name__}.arithmetic.{form}").write(out)
    return out


def judge(folder: Path) -> int:
    """One line for each way that was to be run; the results lie in judged.json, which `record` and `compare` read."""
    from moe_harness.harness.gate import steps, view
    from moe_harness.harness.gate.judging import judge as judged

    answered = json.loads((folder / "answered.json").read_text("utf-8"))
    verdicts: list[str] = []
    results: list[dict[str, Any]] = []
    try:
        asked, (baseline,) = steps.scored(folder / "requests.jsonl", [folder / "baseline.jsonl"])
    except HarnessError as error:
        print(f"baseline: not judged: {error}")
        return EXIT_CANNOT_JUDGE
    for name, ended in answered.items():
        if name == "baseline":
            continue
        if "left_out" in ended:
            print(f"{name}: left out: {ended['left_out']}")
            continue
        try:
            (candidate,) = steps.scored(folder / "requests.jsonl", [folder / f"{name}.jsonl"])[1]
            result = judged(asked.task, asked.gated, baseline, candidate, MARGIN)
            result |= {"candidate": f"{candidate.spec} {name}", "parts": parts(asked, baseline, candidate),
                       "falls_of_resampled": falls(result["documents"], *result["discordant"])}  # fmt: skip
            wanted = ended.get("wanted", "pass")
            verdicts.append(seen(result["verdict"], wanted))
            results.append(result)
            told = result["verdict"] if result["verdict"] == wanted else f"{result['verdict']}, wanted {wanted}"
            print(f"{name}: {told}  {view.summary(result)}{_of_parts(result['parts'])}", flush=True)
        except HarnessError as error:
            verdicts.append("error")
            print(f"{name}: not judged: {error}")
    print(_of_nulls([r["falls_of_resampled"] for r in results if "planted" not in r["candidate"]]))
    (folder / "judged.json").write_text(json.dumps({"results": results}) + "\n", "utf-8")
    return verdict_status(verdicts)


def falls(documents: int, worse: int, better: int) -> int:
    """How many of NULLS draws of as many questions, with replacement, the gate calls a fall."""
    import numpy as np

    from moe_harness.harness.gate.statistics import Paired, verdict

    shares = np.array([worse, better, documents - worse - better]) / documents
    drawn = np.random.default_rng(0).multinomial(documents, shares, size=NULLS).tolist()
    return sum(verdict(Paired(documents, b, c), MARGIN) == "fail" for b, c, _ in drawn)


def _of_nulls(found: list[int]) -> str:
    """The share of falls over all ways, with its interval of 95 %, and that of the worst way."""
    if not found:
        return "nothing was resampled"
    from scipy.stats import binomtest

    low, high = binomtest(sum(found), NULLS * len(found)).proportion_ci(0.95)
    return (
        f"resampled {NULLS} times each: {sum(found)} of {NULLS * len(found)} called a fall "
        f"[{low:.2%}, {high:.2%}], at most {max(found)} of one way"
    )


def parts(asked: Any, baseline: Any, candidate: Any) -> dict[str, int] | None:
    """How many of PARTS drawn quarters of the questions pass, fail or decide nothing; None where they are too small."""
    from dataclasses import replace

    from moe_harness.harness.gate.judging import judge as judged

    count = len(baseline.rows)
    if count // 4 < DECIDES:
        return None
    found: collections.Counter[str] = collections.Counter()
    for seed in range(PARTS):
        drawn = random.Random(seed).sample(range(count), count // 4)
        sides = [replace(side, rows=[side.rows[at] for at in drawn]) for side in (baseline, candidate)]
        found[judged(asked.task, asked.gated, *sides, MARGIN)["verdict"]] += 1
    return dict(found)


def _of_parts(found: dict[str, int] | None) -> str:
    if found is None:
        return ""
    return f"; of {PARTS} quarters " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items()))


def seen(verdict: str, wanted: str) -> str:
    """The verdict on a way as one on the gate: a planted fault that passes is a failure of the gate."""
    if wanted == verdict:
        return "pass"
    return "fail" if {wanted, verdict} == {"pass", "fail"} else verdict


def verdict_status(verdicts: list[str]) -> int:
    """A failure is one whatever else could not be judged; nothing at all is no pass."""
    if "fail" in verdicts:
        return EXIT_FAIL
    return EXIT_PASS if verdicts and set(verdicts) == {"pass"} else EXIT_CANNOT_JUDGE


def _answer(*arguments: str, gpu: str | None) -> int:
    from moe_harness.harness.gate.steps import run_answer

    seen_by_it = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return int(run_answer(list(arguments), os.environ | seen_by_it).returncode)


def _gpus(device: str) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if device != "cuda":
        return []
    import torch

    numbers = [str(number) for number in range(torch.cuda.device_count())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[: len(numbers)] if visible else numbers


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
    parser.add_argument("--jobs", type=int, default=1, help="ways at a time")
    parser.add_argument("--only", action="append", metavar="WAY", help="this one besides the baseline; repeatable")
    asked = parser.parse_args()
    gpus = _gpus(asked.device)
    planned = list(ways(asked.device, len(gpus)))
    if asked.only:
        if missing := set(asked.only) - {way.name for way in planned}:
            parser.error(f"there is no {', '.join(sorted(missing))}; there are {', '.join(w.name for w in planned)}")
        planned = [way for way in planned if way.name in ("baseline", *asked.only)]
    if asked.step in ("requests", "all") and (status := requests(asked.folder, asked.limit)):
        sys.exit(status)
    status = EXIT_PASS
    if asked.step in ("answer", "all"):
        status = answer(asked.folder, asked.device, planned, asked.timeout, asked.jobs, gpus)
    if asked.step in ("judge", "all"):  # a way that was not answered is told there
        status = judge(asked.folder)
    sys.exit(status)


if __name__ == "__main__":
    main()
