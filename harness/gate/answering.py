"""Requests to answers: a batch at a time, each kept before the next, with the time left.

Batches are formed from all requests, longest first, and a batch is answered as a whole, so an interrupted run that goes
on asks exactly what an uninterrupted one would have asked.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, CannotJudge, HarnessError
from moe_harness.harness.gate.answerers import Answerer
from moe_harness.harness.gate.exchange import Answer, Request
from moe_harness.harness.gate.ledger import Ledger

Told = Callable[[int, int, float], None]  # questions answered, of how many, seconds left
STDERR = 2
GRACE = 5.0  # seconds after which a process ends whose threads do not get their turn: a kernel that holds the lock


def batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Requests of similar length together; the same whatever is answered already."""
    ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.key))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def answer_all(
    answerer: Answerer, requests: Sequence[Request], ledger: Ledger, *, batch_size: int, timeout: float, told: Told
) -> dict[str, Answer]:
    """Every answer by its request's key, from the ledger where it has them.

    Raises:
        CannotJudge: the implementation raised.  Where it does not return within `timeout` seconds, the process ends
            with the status of that.
    """
    todo = [b for b in batches(requests, batch_size) if any(request.key not in ledger.answers for request in b)]
    total, left = len(requests), sum(map(len, todo))
    started, answered = time.monotonic(), 0
    told(total - left, total, float("nan"))
    for batch in todo:
        try:
            with _limited(timeout, len(batch)):
                found = answerer.answer(batch)
        except HarnessError:
            raise
        except (Exception, SystemExit) as error:  # a kernel that calls sys.exit has answered nothing either
            asked = ", ".join(str(request.doc_id) for request in batch[:8]) + (", ..." if len(batch) > 8 else "")
            raise CannotJudge(
                f"it raised {type(error).__name__}: {error}\n  on questions {asked}; that is no wrong answer but none, "
                "so nothing is judged (--debug shows where)"
            ) from error
        ledger.add(found)
        answered += len(batch)
        pace = (time.monotonic() - started) / answered
        told(total - left + answered, total, pace * (left - answered))
    return {request.key: ledger.answers[request.key] for request in requests}


@contextlib.contextmanager
def _limited(seconds: float, batch: int) -> Iterator[None]:
    """End the process where a batch takes longer: nothing else ends a kernel that hangs."""

    def late() -> None:
        faulthandler.dump_traceback(file=STDERR)  # sys.stderr may be a bar's
        os.write(STDERR, f"no answers to a batch of {batch} after {seconds:g} s (--timeout)\n".encode())
        for rank in multiprocessing.active_children():  # a rank that hangs would outlive this process
            rank.kill()
        os._exit(EXIT_CANNOT_JUDGE)

    watch = threading.Timer(seconds, late)
    watch.daemon = True
    watch.start()
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    try:
        yield
    finally:
        watch.cancel()
        faulthandler.cancel_dump_traceback_later()
