"""What one rank does for a case of the stage `model`: load its part, make the calls that all ranks make, judge them.

    load_model(model_dir, *, device, dtype, group, expert_parallel) -> model

Every call is made on every rank with the same arguments, and every rank has to have the whole result: logits [B, L, V]
of all of the vocabulary, all new tokens.
"""

import functools
import time
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import Subject, load
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.ranked_task import Rank, Refused, digest, enter
from moe_harness.harness.diagnosis.search import SECONDS
from moe_harness.harness.stages.model import spread
from moe_harness.harness.stages.model.cases import ModelCase
from moe_harness.harness.stages.model.causes import of_logits
from moe_harness.harness.stages.model.stage import STAGE, ModelCall, Question, ask, prompts_of, what_lacks

POLL = 0.005  # seconds between looks for what another rank writes
HEAT, SEED = 8.0, 11  # of what is drawn: hot enough that the largest logit seldom wins


def run(me: Rank, spec: dict[str, str], seed: int) -> RankReport:
    """Task: spec = {"impl": ..., "case": id}.  Returns a RankReport."""
    _, _, case = parse_id(spec["case"])
    assert isinstance(case, ModelCase)
    subject, asked, report = _subject(spec["impl"]), _asked(me, case), RankReport(me.rank)
    try:
        _Judged(me, subject, case, asked, report).judge()
    except Refused as refusal:
        report.rejected = str(refusal)
    return report


@functools.cache
def _subject(spec: str) -> Subject:
    return load("model", spec)


# ------------------------------------------------------------------------------------------------ the question, once


@dataclass(frozen=True)
class ModelTask:
    """A checkpoint on disk, and what is asked of who loads it."""

    folder: Path
    question: Question


def _asked(me: Rank, case: ModelCase) -> ModelTask:
    """What the first rank that comes makes for all of its machine: the right answers take a second of a core."""
    alone = case.but(R=1, ep=False)
    place = Path(me.folder) / f"model-{sha1(alone.id().encode()).hexdigest()[:12]}"
    told = place / "question.pt"
    try:
        place.mkdir()
    except FileExistsError:
        while not told.exists():  # a maker that fails ends the case, and this process with it
            time.sleep(POLL)
    else:
        question = ask(alone)
        checkpoints.write(place / "checkpoint", question.keys, question.weights, case.shards)
        torch.save(question, place / "unfinished")
        (place / "unfinished").rename(told)
    return ModelTask(place / "checkpoint", torch.load(told, weights_only=False))


# ---------------------------------------------------------------------------------------------------------- the calls


@dataclass
class _Judged:
    """One rank's calls, and what it finds."""

    me: Rank
    subject: Subject
    case: ModelCase
    asked: ModelTask
    report: RankReport

    def judge(self) -> None:
        model = self._load()
        lacking = what_lacks(model, self.case.variant)
        if lacking:
            self.report.fail("contract", f"rank {self.me.rank}: {lacking}")
        elif self.case.variant == "logits":
            self._judge_logits(model)
        else:
            self._judge_tokens(model)

    def _load(self) -> Any:
        declared = self.subject.declared.dtypes
        if self.case.dtype not in declared:
            raise Refused(f"{self.case.dtype} is not among the declared dtypes ({', '.join(declared)})")
        keywords = {
            "device": str(self.me.device), "dtype": DTYPES[self.case.dtype], "group": self.me.group,
            "expert_parallel": self.case.ep,
        }  # fmt: skip
        if missing := self.subject.missing_keywords(keywords):
            raise Refused(f"it has no parameter {missing[0]!r}, by which a model over ranks is asked for")
        return enter(self.me, self.subject.call, {"model_dir": str(self.asked.folder)}, keywords)

    def _judge_logits(self, model: Any) -> None:
        """Teacher-forced: all positions of the prompts at once, against the fp64 reference on one rank."""
        question, ids = self.asked.question, self.asked.question.ids.to(self.me.device)
        bound = question.bound
        assert bound is not None
        logits = enter(self.me, model, ids)
        if not torch.equal(ids.cpu(), question.ids):
            self.report.fail("contract", f"rank {self.me.rank}: model(input_ids) has written into input_ids")
        dtypes, wanted = (DTYPES[self.case.dtype], torch.float32), tuple(bound.value.shape)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted or logits.dtype not in dtypes:
            self._of_another_form("model(input_ids)", logits, f"{list(wanted)} of {dtypes[0]}")
            return
        call = ModelCall(self.case, {}, {"device": str(self.me.device)}, question=question)
        record = STAGE.judge(call, logits.flatten(0, 1), None)
        self.report.observed["logits"] = digest(logits)
        causes = self._causes(logits) if record.findings else []
        self._take(record, causes)

    def _causes(self, logits: Tensor) -> list[dict[str, str]]:
        """What the ranks do wrong together, else (told by one rank, they have the same) what each does alone."""
        question = self.asked.question
        found = spread.causes(question, logits.cpu(), self.me.rank, self.me.world_size, self.case.ep)
        return found or (of_logits(question, self.case, logits.cpu(), SECONDS) if self.me.rank == 0 else [])

    def _judge_tokens(self, model: Any) -> None:
        """End to end: greedy tokens against the reference's; of drawn ones that they are tokens at all."""
        question, drawn = self.asked.question, self.case.variant == "drawn"
        prompts, vocabulary = prompts_of(question.ids), question.keys["vocab_size"]
        how = {"temperature": HEAT, "seed": SEED} if drawn else {}
        tokens = enter(self.me, model.generate, prompts, max_new_tokens=self.case.new, ignore_eos=True, **how)
        if not _are_tokens(tokens, len(prompts), self.case.new, vocabulary):
            self._of_another_form(
                "generate", tokens, f"{len(prompts)} lists of {self.case.new} tokens below {vocabulary}"
            )
            return
        self.report.observed |= {"tokens": [[int(token) for token in row] for row in tokens], "drawn": drawn}
        if not drawn:
            call = ModelCall(self.case, {}, {"device": str(self.me.device)}, question=question)
            self._take(STAGE.judge(call, torch.tensor(tokens), None), [])

    def _take(self, record: Any, causes: list[dict[str, str]]) -> None:
        for finding in record.findings:
            where = {"rank": self.me.rank, **finding.where}
            message = f"rank {self.me.rank}: {finding.message}"
            self.report.fail("over_ranks", message, headroom=finding.headroom, where=where, diagnosis=causes)

    def _of_another_form(self, what: str, got: Any, wanted: str) -> None:
        """A result that cannot be compared: what it is, and where that is a known form, why."""
        told = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else _kind(got)
        message = f"rank {self.me.rank}: {what} gave {told}, wanted {wanted}: the whole result on every rank"
        why = spread.form(got, self.asked.question, self.me.world_size)
        self.report.fail("contract", message, diagnosis=why)


def _are_tokens(tokens: Any, prompts: int, new: int, vocabulary: int) -> bool:
    try:
        rows = [[int(token) for token in row] for row in tokens]
    except (TypeError, ValueError):
        return False
    return [len(row) for row in rows] == [new] * prompts and all(0 <= t < vocabulary for row in rows for t in row)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        return f"lists of {[len(row) for row in value]} values"
    return type(value).__name__
