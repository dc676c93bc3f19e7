"""Checks that only a GPU can make: graph replay, side streams, offsets beyond 2^31."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.checks.memory import copies, refill, results_of
from moe_harness.harness.checks.plain import plain
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.cuda_graphs import captured
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.memory import poison_value

REPLAYS = 12
SLEEP_CYCLES = 20_000_000  # about 10 ms at 2 GHz: far longer than a launch, so that a wrong stream runs ahead


def graph_replay(trial: Trial, case: Case) -> Record:
    """Capture once; replay with other inputs and poisoned outputs, after the allocator was churned by another shape."""
    record = Record()
    if not trial.subject.declared.graph_capturable:
        record.skipped = "not declared graph_capturable"
        return record
    call = trial.build(case)
    trial.invoke(call)
    graph, result = _capture(trial, call)
    _churn(trial, case)
    for turn in range(REPLAYS):
        refill(call, trial.build(case.but(seed=case.seed + 1000 + turn)))
        trial.expect_written(call)
        for tensor in returned(result):
            tensor.fill_(poison_value(tensor.dtype))
        graph.replay()
        torch.cuda.synchronize()
        record.merge(trial.judge(call, kept(trial.collected(call, result))), f"replay {turn}: ")
        if record.findings:
            break
    return record


def _capture(trial: Trial, call: Call) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            trial.launch(call, wait=False)
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.no_grad():
            return captured(lambda: trial.launch(call, wait=False))
    except Rejected:
        raise
    except Exception as error:  # ending a capture that failed raises an error of its own over what failed in it
        cause = error.__context__ or error
        raise Broken(f"is declared graph_capturable, but cannot be captured: {cause}") from error


def _churn(trial: Trial, case: Case) -> None:
    with contextlib.suppress(Rejected):
        trial.invoke(trial.build(case.resized()))
    junk = [torch.full((1 << size,), float("nan"), device="cuda") for size in range(8, 22)]
    del junk


def side_stream(trial: Trial, case: Case) -> Record:
    """Inputs arrive late on a stream of its own: a kernel launched on another one reads what was there before."""
    late, values = trial.build(case.but(seed=case.seed + 5)), trial.build(case)
    trial.invoke(late)  # compile and tune outside
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(SLEEP_CYCLES)
        refill_quietly(late, values)
        result = kept(trial.result_of(late, trial.launch(late, wait=False)))
    torch.cuda.synchronize()
    return trial.judge(values, result)


def returned(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a call returned; none where it only writes in place."""
    return () if result is None else results_of(result)


def kept(result: Any) -> Any:
    """A copy of what a call yields."""
    return copies(result) if isinstance(result, tuple) else copies(result)[0]


def refill_quietly(call: Call, values: Call) -> None:
    """As `refill`, without the snapshots that would wait for the device."""
    from moe_harness.harness.checks.memory import tensors

    for name, tensor in tensors(call).items():
        tensor.copy_(tensors(values)[name], non_blocking=True)


def large_offsets(trial: Trial, case: Case) -> Record:
    """More than 2^31 elements in one operand, judged exactly."""
    try:
        return plain(trial, case)
    finally:
        torch.cuda.empty_cache()
