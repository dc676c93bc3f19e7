"""The three steps between files: questions, answers, result; and the process that answers.

What judges is imported where it is needed: the processes that answer do without SciPy, which takes 0.8 s to import.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate import exchange, task
from moe_harness.harness.gate.answerers import Settings, find
from moe_harness.harness.gate.answering import Told, answer_all
from moe_harness.harness.gate.ledger import Ledger

if TYPE_CHECKING:
    from moe_harness.harness.gate.judging import Side


def ledger_folder() -> Path:
    """Where answers are kept unless a folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-harness" / "gate"


def make_requests(asked: task.Asked, out: Path) -> int:
    """Step 1: write the questions; how many there are."""
    requests = task.collect(asked)
    exchange.write(out, "gate-requests", {"asked": task.as_dict(asked)}, requests)
    return len(requests)


def make_answers(
    requests: Path, spec: str, settings: Settings, ledger: Path, out: Path, *, fresh: bool, timeout: float, told: Told
) -> dict[str, Any]:
    """Step 2: write the answers of one implementation; who answered."""
    asked = exchange.read_requests(requests)[1]
    answerer = find(spec, settings)
    identity = answerer.identity()
    started = time.monotonic()
    kept = Ledger(ledger, identity, fresh=fresh, lasting=answerer.traceable)
    served = sum(request.key in kept.answers for request in asked)
    if served:
        since = "under the same source, model and versions" if answerer.traceable else "before this run was interrupted"
        print(f"{spec}: {served} of {len(asked)} answers were given {since} (--fresh asks again)", file=sys.stderr)
    answers = answer_all(answerer, asked, kept, batch_size=settings.batch_size, timeout=timeout, told=told)
    about = {"identity": identity, "from_ledger": served, "seconds": round(time.monotonic() - started, 2)}
    exchange.write(out, "gate-answers", about, answers.values())
    kept.delivered()
    return about


def make_result(requests: Path, baseline: Path, candidate: Path, margin: float) -> dict[str, Any]:
    """Step 3: score and judge."""
    from moe_harness.harness.gate.judging import judge

    asked, (before, after) = scored(requests, (baseline, candidate))
    return judge(asked.task, asked.gated, before, after, margin)


def scored(requests: Path, answers: Iterable[Path]) -> "tuple[task.Asked, list[Side]]":
    """What was asked, and lm-eval's scores of each file of answers."""
    from moe_harness.harness.gate.judging import Side

    about, questions = exchange.read_requests(requests)
    if not questions:
        raise CannotJudge(f"{requests} holds no questions")
    try:
        asked = task.Asked(**about["asked"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{requests} does not say which task it asks: {error}") from error
    sides = []
    for path in answers:
        who, found = exchange.read_answers(path)
        sides.append(Side(str(who["identity"].get("spec")), task.score(asked, questions, found), who))
    return asked, sides


def run_answer(
    arguments: list[str], env: dict[str, str] | None = None, run: Callable[..., Any] = subprocess.run
) -> Any:
    """Run `gate answer` to its end, which is this process's own at the latest: killed, it would leave a GPU in use."""
    theirs, ours = os.pipe()  # nothing is said: that this end closes is what is told
    command = [sys.executable, "-m", "moe_harness", "gate", "answer", *arguments, "--lifeline", str(theirs)]
    try:
        return run(command, env=env, pass_fds=(theirs,))
    finally:
        os.close(theirs)
        os.close(ours)


def answer_in_a_process(arguments: list[str], out: Path, spec: str, run: Callable[..., Any] = subprocess.run) -> None:
    """Run `gate answer` by itself: a kernel that kills its process then ends a step, and not the judgement.

    Raises:
        UsageError, CannotJudge: as that process ended.
    """
    try:
        done = run_answer([*arguments, "--out", str(out)], run=run)
    except KeyboardInterrupt:
        print("interrupted; what was answered is kept, and the same command goes on from there", file=sys.stderr)
        raise
    if done.returncode == UsageError.exit_status:
        raise UsageError(f"{spec} was not asked: see above")
    if done.returncode != 0 or not out.is_file():  # a kernel may end its process, even with the status of success
        how = f"died of signal {-done.returncode}" if done.returncode < 0 else f"ended with status {done.returncode}"
        raise CannotJudge(
            f"{spec} gave no complete set of answers: its process {how} (see above). That is a failure of the run and "
            "not a wrong answer; what it did answer is kept, and the same command goes on from there"
        )
