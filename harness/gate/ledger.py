"""Answers that were given, kept under everything they depend on: who answered, and the request.

lm-eval's own cache has no model in its key, so that a candidate is served the baseline's answers and passes any gate
(github.com/EleutherAI/lm-evaluation-harness/issues/4063).  Here each answerer has a file of its own, named by its
identity and with that identity in its first line, and in it each answer lies under its request's key.

Where an identity cannot name the source (a server: what runs behind an address may be another thing tomorrow), the
answers are kept only until they have been delivered: an interrupted run goes on, and a new one asks anew.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate.exchange import Answer, digest, line_of

KIND = "gate-ledger"


class Ledger:
    """The answers of one answerer; whatever is added is on disk before `add` returns.

    Args:
        fresh: forget what is there.
        lasting: whether answers are served to later runs; otherwise `delivered` forgets them.

    Raises:
        CannotJudge: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, fresh: bool = False, lasting: bool = True):
        self.path = folder / f"{digest(identity)}.jsonl"
        self.identity, self.lasting = identity, lasting
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.answers: dict[str, Answer] = {} if fresh else self._kept()
            if not self.answers:
                self.path.write_text(json.dumps({"schema": 1, "kind": KIND, "identity": identity}) + "\n", "utf-8")
        except OSError as error:
            raise CannotJudge(f"answers cannot be kept in {folder} ({error}); --ledger names another folder") from error

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers; a crash afterwards does not lose them."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for answer in answers:
                    file.write(line_of(answer))
                    self.answers[answer.key] = answer
        except OSError as error:
            raise CannotJudge(
                f"an answer cannot be kept in {self.path.parent} ({error}); --ledger names another folder"
            ) from error

    def delivered(self) -> None:
        """All answers have reached who asked."""
        if not self.lasting:
            self.path.unlink(missing_ok=True)

    def _kept(self) -> dict[str, Answer]:
        """What is in the file; nothing where it belongs to another identity, and no line that was cut off."""
        if not self.path.is_file():
            return {}
        # Not splitlines: an answer may hold U+2028, which JSON does not escape.
        first, *lines = self.path.read_text("utf-8").split("\n")
        if not _is_of(first, self.identity):
            return {}
        found: dict[str, Answer] = {}
        for line in lines:
            try:
                answer = Answer.of(json.loads(line))
            except (ValueError, KeyError, TypeError):  # written while the machine went down
                continue
            found[answer.key] = answer
        if found and not self.path.read_text("utf-8").endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")
        return found


def _is_of(line: str, identity: dict[str, Any]) -> bool:
    try:
        return json.loads(line).get("identity") == json.loads(json.dumps(identity))
    except (ValueError, AttributeError):
        return False
