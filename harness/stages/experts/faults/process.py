"""Faults that end, hang or bloat the process.  Call one only in a child process."""

import ctypes
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.experts.faults._steps import run

_leaked: list[Tensor] = []


@fault("process", sign="process")
def segfaults(*call: Tensor, **options: Any) -> Tensor:
    """A null pointer is read: the process dies of SIGSEGV."""
    ctypes.string_at(0)
    return run(*call, **options)


@fault(
    "process", source="vllm-project/vllm/pull/6029", condition="T > 16 (published: T > 65536)", shows={"T": 17},
    sign="process", hidden=("T=16",),
)  # fmt: skip
def segfaults_for_larger_batches(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """An offset overflows for larger batches only: small tests pass and the process dies later."""
    if hidden_states.shape[0] > 16:
        ctypes.string_at(0)
    return run(hidden_states, *call, **options)


@fault("process", condition="an id of -1", shows={"masked": "some"}, sign="process", hidden=("masked=none",))
def aborts_on_minus_one(*call: Tensor, **options: Any) -> Tensor:
    """A failed check of the ids aborts the process instead of raising."""
    if bool((call[4] < 0).any()):
        os.abort()
    return run(*call, **options)


@fault("process", sign="process")
def exits_with_success(*call: Tensor, **options: Any) -> Tensor:
    """The process leaves at once with status 0: a harness that looks at the status only is content."""
    os._exit(0)


@fault("process", sign="process")
def calls_sys_exit(*call: Tensor, **options: Any) -> Tensor:
    """sys.exit(0) from inside the call: no ordinary `except Exception` sees it."""
    sys.exit(0)


@fault("process", sign="process")
def never_returns(*call: Tensor, **options: Any) -> Tensor:
    """The call waits for ever, as a kernel does whose flag is never set."""
    flag = torch.zeros(1)
    while not flag:
        pass
    return run(*call, **options)


@fault("process", condition="T = 0", shows={"T": 0}, sign="process", hidden=("T=1",))
def never_returns_without_tokens(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A loop over tiles never ends when there is no token."""
    left = hidden_states.shape[0] - 1
    while left != 0:  # a do-while over tiles: it misses 0 when it starts below
        left -= 1
    return run(hidden_states, *call, **options)


@fault("process", condition="many calls", sign="process", stateful=True)
def leaks_memory(*call: Tensor, **options: Any) -> Tensor:
    """16 MB are kept by every call: a server runs out of memory after some minutes."""
    _leaked.append(torch.ones(1 << 22))
    return run(*call, **options)


@fault(
    "process",
    condition="many calls",
    sign="process",
    stateful=True,
    few="it hangs on no shape, and one case of many equal calls looks for it",
)
def results_kept_for_ever(*call: Tensor, **options: Any) -> Tensor:
    """Every result is kept: memory runs out after hours, and no single call looks wrong."""
    result = run(*call, **options)
    _leaked.append(result.clone())
    return result


@fault("process", sign="process")
def is_killed(*call: Tensor, **options: Any) -> Tensor:
    """The process is killed from outside, as by the out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)
    return run(*call, **options)


@fault("process", sign="raises")
def recurses_for_ever(*call: Tensor, **options: Any) -> Tensor:
    """The retry calls itself until Python gives up."""
    return recurses_for_ever(*call, **options)


@fault(
    "process", source="flashinfer-ai/flashinfer/pull/4158", condition="T = 1", shows={"T": 1}, sign="process",
    hidden=("T=2",),
)  # fmt: skip
def killed_for_one_token(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The candidate for one token divides by a block count of 0 and the process is gone."""
    if hidden_states.shape[0] == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    return run(hidden_states, *call, **options)
