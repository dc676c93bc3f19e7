"""What the gate costs over plain lm-eval: two runs of lm-eval, against one gate over the same two implementations.

    python -m moe_harness.suites.accuracy.overhead docs/gate_overhead.json [--questions 64]

Seconds are those of the processor, of all processes of a side from start to end, so that they stand on a busy machine:
the same questions in the same batches on one thread, by lm-eval's HFLM, and by the gate, which also forces the gold
answers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_harness import fixtures
from moe_harness.fixtures.arithmetic import write_dataset
from moe_harness.harness.gate import identity

MODEL = Path(fixtures.__file__).parent / "checkpoints" / "arithmetic-moe"
IMPLEMENTATIONS = ("eager", "grouped_mm")
BATCH = 64
PLAIN = """
import sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folder, model, implementation, batch = sys.argv[1:]
hflm = HFLM(pretrained=model, dtype="bfloat16", device="cpu", batch_size=int(batch),
            experts_implementation=implementation)
found = lm_eval.simple_evaluate(model=hflm, tasks=["plain_arithmetic"], bootstrap_iters=0,
                                task_manager=TaskManager(include_path=folder, include_defaults=False))
print(found["results"]["plain_arithmetic"]["exact_match,strict-match"])
"""
TASK = r"""
task: plain_arithmetic
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/train.jsonl, test: FOLDER/test.jsonl}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 3
fewshot_config: {sampler: first_n}
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 128}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - name: strict-match
    filter: [{function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)"}, {function: take_first}]
"""


def seconds(*command: str) -> float:
    """User and system time of a command with all its children.

    Raises:
        RuntimeError: it failed; its last words.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):  # few questions decide nothing
        raise RuntimeError(f"{' '.join(command[:6])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(folder: Path, questions: int) -> dict[str, Any]:
    """Both sides, in seconds of the processor."""
    write_dataset(folder, test=questions, train=64)
    (folder / "task.yaml").write_text(TASK.replace("FOLDER", str(folder)), "utf-8")
    plain = [
        seconds(sys.executable, "-c", PLAIN, str(folder), str(MODEL), name, str(BATCH)) for name in IMPLEMENTATIONS
    ]

    gate = seconds(
        sys.executable, "-m", "moe_harness", "gate", "--model", str(MODEL), "--task", "arithmetic", "--data",
        str(folder), "--batch-size", str(BATCH), "--fresh", "--ledger", str(folder / "ledger"), "--json",
        str(folder / "gate.json"), "--baseline", f"transformers:{IMPLEMENTATIONS[0]}", "--candidate",
        f"transformers:{IMPLEMENTATIONS[1]}",
    )  # fmt: skip
    return {
        "questions": questions, "batch_size": BATCH, "plain_seconds": [round(x, 1) for x in plain],
        "gate_seconds": round(gate, 1), "over_plain": round(gate / sum(plain) - 1, 3),
        "accuracy": json.loads((folder / "gate.json").read_text("utf-8"))["accuracy"], **identity.surroundings("cpu"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_harness.suites.accuracy.overhead", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.questions)
    asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
