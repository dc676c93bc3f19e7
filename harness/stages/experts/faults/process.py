"""Faults that end, hang or bloat the process.  Call one only in a child process."""

import ctypes
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.experts.faults.slots import BUGS, run

_leaked: list[Tensor] = []


@fault(
    "experts",
    "process",
    condition="always",
    sign="process",
    shows={},
    consequence="A null pointer is read: the process dies of SIGSEGV.",
)
def segfaults(*call: Tensor, **options: Any) -> Tensor:
    ctypes.string_at(0)
    return run(*call, **options)


@fault(
    "experts",
    "process",
    source=BUGS + "vllm-project/vllm/pull/6029",
    sign="process",
    condition="T > 16 (published: T > 65536)",
    shows={"T": 17},
    hidden=("T=16",),
    consequence="An offset overflows for larger batches only: small tests pass and the process dies later.",
)
def segfaults_for_larger_batches(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    if hidden_states.shape[0] > 16:
        ctypes.string_at(0)
    return run(hidden_states, *call, **options)


@fault(
    "experts",
    "process",
    condition="an id of -1",
    sign="process",
    shows={"ids": "masked"},
    hidden=("ids='distinct'",),
    consequence="A failed check of the ids aborts the process instead of raising.",
)
def aborts_on_minus_one(*call: Tensor, **options: Any) -> Tensor:
    if bool((call[4] < 0).any()):
        os.abort()
    return run(*call, **options)


@fault(
    "experts",
    "process",
    condition="always",
    sign="process",
    shows={},
    consequence="The process leaves at once with status 0: a harness that looks at the status only is content.",
)
def exits_with_success(*call: Tensor, **options: Any) -> Tensor:
    os._exit(0)


@fault(
    "experts",
    "process",
    condition="always",
    sign="process",
    shows={},
    consequence="sys.exit(0) from inside the call: no ordinary `except Exception` sees it.",
)
def calls_sys_exit(*call: Tensor, **options: Any) -> Tensor:
    sys.exit(0)


@fault(
    "experts",
    "process",
    condition="always",
    sign="process",
    shows={},
    consequence="The call waits for ever, as a kernel does whose flag is never set.",
)
def never_returns(*call: Tensor, **options: Any) -> Tensor:
    flag = torch.zeros(1)
    while not flag:
        pass
    return run(*call, **options)


@fault(
    "experts",
    "process",
    condition="T = 0",
    sign="process",
    shows={"T": 0},
    hidden=("T=1",),
    consequence="A loop over tiles never ends when there is no token.",
)
def never_returns_without_tokens(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    left = hidden_states.shape[0] - 1
    while left != 0:  # a do-while over tiles: it misses 0 when it starts below
        left -= 1
    return run(hidden_states, *call, **options)


@fault(
    "experts",
    "process",
    condition="many calls",
    sign="process",
    stateful=True,
    shows={},
    consequence="16 MB are kept by every call: a server runs out of memory after some minutes.",
)
def leaks_memory(*call: Tensor, **options: Any) -> Tensor:
    _leaked.append(torch.ones(1 << 22))
    return run(*call, **options)


@fault(
    "experts",
    "process",
    condition="many calls",
    sign="process",
    stateful=True,
    shows={},
    consequence="Every result is kept: memory runs out after hours, and no single call looks wrong.",
)
def results_kept_for_ever(*call: Tensor, **options: Any) -> Tensor:
    result = run(*call, **options)
    _leaked.append(result.clone())
    return result


@fault(
    "experts",
    "process",
    condition="always",
    sign="process",
    shows={},
    consequence="The process is killed from outside, as by the out-of-memory killer.",
)
def is_killed(*call: Tensor, **options: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return run(*call, **options)


@fault(
    "experts",
    "process",
    condition="always",
    sign="raises",
    shows={},
    consequence="The retry calls itself until Python gives up.",
)
def recurses_for_ever(*call: Tensor, **options: Any) -> Tensor:
    return recurses_for_ever(*call, **options)


@fault(
    "experts",
    "process",
    source=BUGS + "flashinfer-ai/flashinfer/pull/4158",
    condition="T = 1",
    sign="process",
    shows={"T": 1},
    hidden=("T=2",),
    consequence="The candidate for one token divides by a block count of 0 and the process is gone.",
)
def killed_for_one_token(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    if hidden_states.shape[0] == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    return run(hidden_states, *call, **options)
