"""The judging process: it loads one implementation and judges cases on request, so that nothing it does harms the run.

Forked from a server that has torch and this module imported, it costs about 50 ms.  What the
implementation prints goes to a file; when the process dies its last lines tell why.
"""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch

from moe_harness.harness.checks import CHECKS
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.environment import versions, what_is_missing
from moe_harness.harness.core.errors import CannotJudge, HarnessError, Lacks
from moe_harness.harness.core.findings import Answer, Explanation, Loaded, NotLoaded, Record
from moe_harness.harness.core.invocation import Broken, Rejected, Trial, first_line, kept_defaults
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.process.parent_watch import end_with
from moe_harness.harness.run.data_power import JUDGING, Proof, prove

KEPT = 2 << 30  # bytes of device memory that a worker keeps between cases


def serve(connection: Connection, output: str, stage: str, spec: str, device: str) -> None:
    """Load, report, then judge one (check, case) per message until the connection closes."""
    end_with(connection)
    _quieten(output)
    torch.set_num_threads(2 if device == "cuda" else 1)  # as many workers run as there are cores, or half as many
    trial = _loaded(connection, stage, spec, device)
    if trial is None:
        return
    while True:
        try:
            message = connection.recv()  # (task, arguments...)
        except EOFError:
            return
        connection.send(TASKS[message[0]](trial, *message[1:]))


def judge_id(trial: Trial, case_id: str) -> Answer:
    """Judge the case of that id; whatever goes wrong, in the implementation or here, is part of the answer."""
    _, check, case = parse_id(case_id)
    started = perf_counter()
    record, status, reason, proof, lacks = Record(), "passed", None, Proof(case), False
    try:
        proof = prove(trial, case) if check in JUDGING else proof
        if proof.case is None:
            record.skipped = f"no data of this shape tell a right result from {', '.join(proof.accepted)}"
        else:
            record = CHECKS[check](trial, proof.case)
        status, reason = (
            ("failed", None) if record.findings else ("skipped", record.skipped) if record.skipped else (status, None)
        )
    except Rejected as error:
        status, reason = "unsupported", str(error)
    except Broken as error:
        record.fail(str(error), headroom=float("inf"))
        status = "failed"
    except HarnessError as error:
        status, reason, lacks = "error", str(error), isinstance(error, Lacks)
    except Exception as error:
        if (missing := what_is_missing(error)) is not None:  # the judge needs it to lay out the case
            status, reason, lacks = "error", missing, True
        elif _is_out_of_memory(error):
            status, reason = "skipped", f"not enough memory on this device: {first_line(error)[:120]}"
        else:
            status, reason = "error", f"the harness failed on {case_id}: {traceback.format_exc()}"
    judged = case_id if proof.case in (None, case) else Planned(check, proof.case).id
    seconds = perf_counter() - started
    lost = status in ("failed", "error", "skipped") and _is_device_lost(trial.device)
    if trial.device == "cuda" and not lost and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()  # the other workers need it
    return Answer(case_id, status, reason, seconds, record, judged, proof.rejected, proof.accepted, lost, lacks)


def _is_device_lost(device: str) -> bool:
    """Whether a CUDA error has poisoned this process; every later call in it would fail, whoever makes it."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def explain_id(trial: Trial, case_id: str, seconds: float) -> Explanation:
    """Known faults that explain what a failing case yields, best first, and what its error looks like."""
    from moe_harness.harness.diagnosis.operands import ignored_offsets
    from moe_harness.harness.diagnosis.patterns import looks
    from moe_harness.harness.diagnosis.search import explain, known
    from moe_harness.harness.diagnosis.sources import read_off

    case = parse_id(case_id)[2]
    try:
        told, seen = explain(trial, case, seconds), looks(trial, case)
        if not told:
            seen += [*read_off(trial, case), *ignored_offsets(trial, case)]
        return Explanation(told, seen, known(trial.stage))
    except (Rejected, Broken):  # it does other things than when it was judged: a failure of its state, told elsewhere
        return Explanation()
    except Exception as error:  # the failure stands; that nothing explains it is the judge's own fault
        return Explanation(looks_like=[f"the search for its cause failed with {type(error).__name__}: {error}"])


def describe(trial: Trial) -> str:
    """How the implementation computes, as far as probes establish it."""
    from moe_harness.harness.diagnosis.numerics_probes import how_it_computes

    return how_it_computes(trial)


TASKS: dict[str, Callable[..., Any]] = {"judge": judge_id, "explain": explain_id, "describe": describe}


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _loaded(connection: Connection, stage: str, spec: str, device: str) -> Trial | None:
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise _no_cuda()
        with kept_defaults():
            subject = load(stage, spec)
        if device not in subject.declared.devices:
            raise _other_device(spec, device, subject.declared.devices)
        if device == "cuda":
            torch.zeros(1, device=device)  # a context takes seconds, which belong to no case
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules
        connection.send(Loaded(subject.declared.as_dict(), versions(), interpreted))
        return Trial(subject, device)
    except HarnessError as error:
        connection.send(NotLoaded(str(error), error.exit_status, traceback.format_exc()))
    except BaseException as error:  # SystemExit at import, a broken declaration
        message = f"implementation {spec!r} cannot be loaded: {type(error).__name__}: {error}"
        connection.send(NotLoaded(message, CannotJudge.exit_status, traceback.format_exc()))
    return None


def _no_cuda() -> HarnessError:
    built = torch.version.cuda
    why = "this torch is built without CUDA" if built is None else f"torch is built for CUDA {built} but sees no device"
    return CannotJudge(f"--device cuda is asked for, but {why}; judge on the CPU with --device cpu")


def _other_device(spec: str, device: str, devices: tuple[str, ...]) -> HarnessError:
    return CannotJudge(f"implementation {spec!r} declares devices {', '.join(devices)}, but --device is {device}")


def _quieten(output: str) -> None:
    """Send what the implementation prints to a file, and a fatal signal's traceback too; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    faulthandler.enable(file=sys.stderr, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=False)
