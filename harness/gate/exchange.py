"""Requests and answers, and how they lie in a file: JSON lines, the first of which says what the file holds."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, UsageError

SCHEMA = 1
LIKELIEST = 5  # tokens kept per position of a gold answer; the rest of the distribution is one number


@dataclass(frozen=True)
class Request:
    """One question in the form that a model reads.

    Attributes:
        task: name and version of the task, so that no answer outlives a change of it.
        doc_id: of the document in the task's test split.
        doc_hash, prompt_hash: as lm-eval writes them into its samples.
        repeat: which of several answers to the same prompt.
        gold: what a perfect model would go on with.
        until: strings that end an answer; they are not part of it.
        max_new_tokens: after which an answer is cut off.
    """

    task: str
    doc_id: int
    doc_hash: str
    prompt_hash: str
    repeat: int
    prompt: str
    gold: str
    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0

    @property
    def key(self) -> str:
        """All that an answer depends on, but for who answers."""
        parts = (
            self.task, self.prompt, self.gold, list(self.until), self.max_new_tokens, self.temperature, self.repeat,
        )  # fmt: skip
        return digest(parts)


@dataclass(frozen=True)
class Gold:
    """What a model thinks of the gold answer when it is forced on it.

    Attributes:
        loglikelihood: of all its tokens, in nats.
        greedy: the likeliest token at each position.
        likeliest: the LIKELIEST tokens at each position with their log-probabilities.
    """

    loglikelihood: float
    tokens: tuple[int, ...]
    greedy: tuple[int, ...]
    likeliest: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        text: cut before the first stop string.
        length: tokens that were generated; None where a server does not tell.
        stop: "stop" (a stop string), "eos" or "length".
    """

    key: str
    text: str
    length: int | None
    stop: str
    gold: Gold | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Answer":
        """From a line of a file; ValueError, TypeError or KeyError where it is none."""
        gold = row.get("gold")
        if gold is not None:
            likeliest = tuple(tuple((int(t), float(p)) for t, p in position) for position in gold["likeliest"])
            gold = Gold(float(gold["loglikelihood"]), tuple(gold["tokens"]), tuple(gold["greedy"]), likeliest)
        return cls(
            str(row["key"]),
            str(row["text"]),
            None if row["length"] is None else int(row["length"]),
            str(row["stop"]),
            gold,
        )


def digest(value: Any) -> str:
    """A name for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def write(path: Path, kind: str, about: dict[str, Any], rows: Iterable[Any]) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(_line({"schema": SCHEMA, "kind": kind, **about}))
        for row in rows:
            file.write(line_of(row))
    unfinished.replace(path)


def line_of(row: Request | Answer) -> str:
    """A request or an answer as it lies in a file."""
    held = vars(row)  # dataclasses.asdict copies every number of a gold answer: 1.2 ms where this takes 0.3
    if isinstance(row, Answer) and row.gold is not None:
        held = held | {"gold": vars(row.gold)}
    return _line(held)


def read(path: Path, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a file, and the others.

    Raises:
        UsageError: no such file, or a file of another kind.
        CannotJudge: a line that is not JSON.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    about, *rows = list(_lines(path)) or [{}]
    if about.get("kind") != kind or about.get("schema") != SCHEMA:
        got = f"{about.get('kind', 'no')!r}, schema {about.get('schema')}"
        raise UsageError(f"{path} holds {got}, but should hold {kind!r}, schema {SCHEMA} (moe-harness gate --help)")
    return about, rows


def read_requests(path: Path) -> tuple[dict[str, Any], list[Request]]:
    """A file that `gate requests` wrote."""
    about, rows = read(path, "gate-requests")
    try:
        return about, [Request(**{**row, "until": tuple(row["until"])}) for row in rows]
    except (KeyError, TypeError) as error:
        raise CannotJudge(f"{path} has a line that is no request: {error}") from error


def read_answers(path: Path) -> tuple[dict[str, Any], dict[str, Answer]]:
    """A file that `gate answer` wrote, by the key of the request."""
    about, rows = read(path, "gate-answers")
    try:
        answers = [Answer.of(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise CannotJudge(f"{path} has a line that is no answer: {type(error).__name__}: {error}") from error
    return about, {answer.key: answer for answer in answers}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                found = json.loads(text)
                if not isinstance(found, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise CannotJudge(f"{path}, line {number} is not a JSON object: {error}") from error
            yield found


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
