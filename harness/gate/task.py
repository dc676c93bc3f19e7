"""The questions of a task as lm-eval asks them, and the scores that lm-eval gives to answers.

    asked = Asked("arithmetic", limit=200)
    requests = collect(asked)                lm-eval's prompts, from a model that only writes them down
    rows = score(asked, requests, answers)   lm-eval's filters and metrics, from a model that only reads answers out

A task is `arithmetic` (drawn from fixtures/arithmetic), `gsm8k` (from the hub, or from a folder in its published
format) or any other of lm-eval's that generates text.  A limited number of questions is drawn: they are not the first
ones, which lm-eval's own limit takes (github.com/EleutherAI/lm-evaluation-harness/issues/2598).
"""

import contextlib
import io
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from moe_harness.harness.core.errors import CannotJudge, UsageError, unknown
from moe_harness.harness.gate.exchange import Answer, Request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

STRICT, FLEXIBLE = "strict-match", "flexible-extract"
STRICT_PATTERN, FLEXIBLE_PATTERN = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
INVALID = "[invalid]"  # what lm-eval's regex filter gives where nothing matches
ARITHMETIC_QUESTIONS = 1319  # as many as GSM8K has
ARITHMETIC_MOST = 100_000  # that --limit may ask for: they are all drawn and held
ARITHMETIC_VERSION = 1.0


@dataclass(frozen=True)
class Asked:
    """Which questions of which task.

    Attributes:
        data: a folder with train.jsonl and test.jsonl (question, answer); None: the task's own data.
        limit: questions; None: all.
        shots: examples before each question; None: the task's own number.
        seed: draws the questions, and the problems of arithmetic.
        max_new_tokens: None: the task's own, or 512 where it has none (lm-eval's model would take 256).
    """

    task: str
    data: str | None = None
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None

    @property
    def gated(self) -> str:
        """The filter whose score is judged: strict where the form was trained, flexible where it was only asked for."""
        return STRICT if self.task == "arithmetic" else FLEXIBLE


@dataclass(frozen=True)
class Row:
    """One question with its answer and lm-eval's scores, by filter."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    right: Mapping[str, bool]
    valid: Mapping[str, bool]
    answer: Answer


def collect(asked: Asked) -> list[Request]:
    """The requests of a task, in the order of the questions.

    Raises:
        UsageError: unknown task, a folder without questions, a limit larger than there are.
        CannotJudge: lm-eval is not installed, or the task's data cannot be fetched.
    """
    with _lm_eval():
        task, name = _task(asked)
        samples = _samples(asked, len(task.eval_docs))
        written = _evaluate(name, task, samples, _recorder())
        answers = [sample for sample in written if sample["filter"] == written[0]["filter"]]
        version = f"{name} {task.VERSION}"
        return [
            request
            for sample, instance in zip(answers, task.instances, strict=True)
            for request in _requests(asked, version, task, sample, instance)
        ]


def score(asked: Asked, requests: Sequence[Request], answers: Mapping[str, Answer]) -> list[Row]:
    """lm-eval's scores of answers, one row per question.

    Raises:
        CannotJudge: an answer is missing, or lm-eval asks other questions than the requests hold.
    """
    missing = sum(request.key not in answers for request in requests)
    if missing:
        raise CannotJudge(f"{missing} of {len(requests)} questions have no answer; run `gate answer` to the end first")
    with _lm_eval():
        task, name = _task(asked)
        samples = _evaluate(name, task, [request.doc_id for request in requests if request.repeat == 0],
                            _reader(requests, answers))  # fmt: skip
    first = {request.doc_id: request for request in requests if request.repeat == 0}
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        request = first[sample["doc_id"]]
        if (sample["doc_hash"], sample["prompt_hash"]) != (request.doc_hash, request.prompt_hash):
            raise CannotJudge(
                f"question {request.doc_id} of {asked.task} is not what it was when the requests were made "
                "(data or lm-eval changed): make them anew with `gate requests`"
            )
        scores = found.setdefault(request.doc_id, {"right": {}, "valid": {}})
        scores["right"][sample["filter"]] = bool(sample[_metric(sample)])
        scores["valid"][sample["filter"]] = sample["filtered_resps"][0] != INVALID
    return [
        Row(
            doc_id,
            first[doc_id].doc_hash,
            first[doc_id].prompt_hash,
            s["right"],
            s["valid"],
            answers[first[doc_id].key],
        )
        for doc_id, s in found.items()
    ]


def _requests(
    asked: Asked, version: str, task: "Task", sample: dict[str, Any], instance: "Instance"
) -> Iterator[Request]:
    prompt, arguments = instance.args
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else list(until)  # a plain string would be taken letter by letter
    longest = asked.max_new_tokens or arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or 512
    temperature = float(arguments.get("temperature") or 0.0) if arguments.get("do_sample") else 0.0
    gold = task.config.target_delimiter + str(sample["target"])
    for repeat in range(instance.repeats):
        yield Request(
            version, sample["doc_id"], sample["doc_hash"], sample["prompt_hash"], repeat, prompt, gold,
            tuple(u for u in until if u), longest, temperature,
        )  # fmt: skip


def _recorder() -> Any:
    """A model that answers nothing: the requests are in the task's instances afterwards."""
    return _model(lambda instances: ["" for _ in instances])


def _reader(requests: Sequence[Request], answers: Mapping[str, Answer]) -> Any:
    """A model that reads out answers, each repeat its own."""
    by_prompt: dict[tuple[str, int], str] = {(r.prompt_hash, r.repeat): answers[r.key].text for r in requests}

    def read(instances: "Sequence[Instance]") -> list[str]:
        from lm_eval.utils import hash_string

        seen: dict[int, itertools.count] = {}
        found = []
        for instance in instances:  # lm-eval passes the same object once per repeat
            repeat = next(seen.setdefault(id(instance), itertools.count()))
            key = (hash_string(instance.args[0]), repeat)
            if key not in by_prompt:
                raise CannotJudge("lm-eval asks a question that is not among the requests: make them anew")
            found.append(by_prompt[key])
        return found

    return _model(read)


def _model(generate: Any) -> Any:
    """lm-eval's LM around a function of its requests."""
    from lm_eval.api.model import LM

    class Written(LM):
        def generate_until(self, requests: Any) -> list[str]:
            return generate(requests)

        def loglikelihood(self, requests: Any) -> Any:
            raise UsageError("the gate takes tasks that generate text; this one asks for log-likelihoods")

        loglikelihood_rolling = loglikelihood

    return Written()


def _evaluate(name: str, task: "Task", samples: list[int], model: Any) -> list[dict[str, Any]]:
    import lm_eval

    with _without_an_inventory():
        found = lm_eval.simple_evaluate(
            model=model, tasks=[task], samples={name: samples}, bootstrap_iters=0, task_manager=_manager(defaults=False)
        )
    assert found is not None  # None on other ranks only
    return found["samples"][name]


def _task(asked: Asked) -> "tuple[Task, str]":
    """lm-eval's task object, with the number of examples that was asked for."""
    if asked.task == "arithmetic":
        loaded = _manager(defaults=False).load([_arithmetic(asked)])
    elif asked.data is not None and asked.task == "gsm8k":
        loaded = _manager(defaults=False).load([_GSM8K | _dataset(_local(Path(asked.data)))])
    elif asked.data is not None:
        raise UsageError(f"--data goes with the tasks gsm8k and arithmetic, not with {asked.task}")
    else:
        loaded = _fetched(asked.task)
    ((name, task),) = loaded["tasks"].items()
    if task.OUTPUT_TYPE != "generate_until":
        raise UsageError(f"task {asked.task} is one of {task.OUTPUT_TYPE}, but the gate takes those that generate text")
    if asked.shots is not None:
        task.set_config(key="num_fewshot", value=asked.shots)
    shots, examples = task.config.num_fewshot or 0, task.fewshot_docs() if task.config.num_fewshot else ()
    if shots > len(examples):
        raise UsageError(f"{shots} examples go before each question of {asked.task}, but there are {len(examples)}: "
                         "take fewer by --shots")  # fmt: skip
    return task, name


def _fetched(name: str) -> Any:
    """One of lm-eval's own tasks, with its data from the hub."""
    manager = _manager(defaults=True)
    if name not in manager.all_subtasks:
        raise unknown("task", name, ["arithmetic", *manager.all_subtasks])
    try:
        return manager.load([name])
    except Exception as error:  # whatever the hub's client raises
        raise CannotJudge(
            f"the data of {name} cannot be fetched ({type(error).__name__}: {error}); "
            "offline, give a folder with train.jsonl and test.jsonl by --data, or take --task arithmetic"
        ) from error


def _manager(*, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _samples(asked: Asked, documents: int) -> list[int]:
    """The questions that are asked, in ascending order; the draw depends on seed, limit and their number alone."""
    if asked.limit is None or asked.limit == documents:
        return list(range(documents))
    if not 0 < asked.limit < documents:
        raise UsageError(f"--limit is {asked.limit}, but should be between 1 and the {documents} questions there are")
    return sorted(random.Random(f"questions {asked.seed}").sample(range(documents), asked.limit))


def _arithmetic(asked: Asked) -> dict[str, Any]:
    """The task over fixtures/arithmetic: GSM8K's form, three examples, which are the same for every question."""
    if asked.data is not None:
        return _ARITHMETIC | _dataset(_local(Path(asked.data)))
    from moe_harness.fixtures.arithmetic import problems

    if asked.limit is not None and asked.limit > ARITHMETIC_MOST:
        raise UsageError(f"--limit is {asked.limit}, but {ARITHMETIC_MOST} questions of arithmetic are the most")
    counts = {"train": 64, "test": max(ARITHMETIC_QUESTIONS, asked.limit or 0)}
    drawn = {
        split: [vars(problem) for problem in itertools.islice(problems(split, asked.seed), count)]
        for split, count in counts.items()
    }
    return _ARITHMETIC | _dataset(drawn)


def _local(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The questions of a folder in GSM8K's published format."""
    found = {}
    for split in ("train", "test"):
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            raise UsageError(f"--data {folder}: there is no {split}.jsonl; wanted are train.jsonl and test.jsonl with "
                             '{"question": ..., "answer": ...} a line')  # fmt: skip
        try:
            lines = file.read_text("utf-8").split("\n")  # splitlines would break a question at U+2028
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8: {error}") from error
        found[split] = [_question(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not found[split]:
            raise UsageError(f"{file} holds no questions")
    return found


def _question(file: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
        return {"question": str(row["question"]), "answer": str(row["answer"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f'{file}, line {number}: wanted {{"question": ..., "answer": ...}}, got {line[:80]!r}'
        ) from error


def _dataset(rows: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """Questions in memory, past the cache of `datasets`, which could hold another version of a file."""

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list(part) for split, part in rows.items()}

    return {"custom_dataset": dataset}


def _metric(sample: dict[str, Any]) -> str:
    for name in ("exact_match", *sample["metrics"]):
        if name in sample["metrics"] and isinstance(sample[name], bool | int | float):
            return name
    raise UsageError(f"the task scores by {', '.join(sample['metrics'])}; the gate needs one that is right or wrong")


@contextlib.contextmanager
def _lm_eval() -> Iterator[None]:
    """lm-eval without its chatter; CannotJudge where it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise CannotJudge(f"the gate needs lm-eval: pip install 'moe-harness[eval]' ({error})") from error
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), _quiet_progress():
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _without_an_inventory() -> contextlib.AbstractContextManager[Any]:
    """lm-eval closes each evaluation with an account of the machine, for which it imports transformers and asks pip for
    all packages: a second of the processor, three times a gate, for what nobody reads here (identity has the versions).
    """
    from lm_eval import evaluator

    return mock.patch.object(evaluator, "add_env_info", lambda results: None, create=True)


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """lm-eval shows a bar while it builds prompts, and git complains outside a repository: that is not ours to tell."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


_COMMON: dict[str, Any] = {
    "output_type": "generate_until", "training_split": "train", "fewshot_split": "train", "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "{{answer}}", "repeats": 1,
    "metric_list": [{
        "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
        "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
    }],
    "filter_list": [
        {"name": STRICT, "filter": [
            {"function": "regex", "regex_pattern": STRICT_PATTERN}, {"function": "take_first"}]},
        {"name": FLEXIBLE, "filter": [
            {"function": "regex", "group_select": -1, "regex_pattern": FLEXIBLE_PATTERN},
            {"function": "take_first"}]},
    ],
}  # fmt: skip
_GSM8K = _COMMON | {
    "task": "gsm8k", "num_fewshot": 5, "metadata": {"version": 3.0},
    "generation_kwargs": {
        "until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 512,
    },
}  # fmt: skip
_ARITHMETIC = _COMMON | {
    "task": "arithmetic", "num_fewshot": 3, "metadata": {"version": ARITHMETIC_VERSION},
    "fewshot_config": {"sampler": "first_n"},
    "generation_kwargs": {"until": ["Question:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 128},
}  # fmt: skip


def as_dict(asked: Asked) -> dict[str, Any]:
    """For the first line of a file."""
    return asdict(asked)
