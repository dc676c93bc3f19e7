"""The dispatchers on GPUs: every planned case over NCCL, one rank on each GPU, bit for bit against the dense layer.

tox -e multigpu
"""

import random

import pytest

from moe_harness.harness.core.plan import Planned
from moe_harness.harness.ranks import judge
from moe_harness.harness.ranks.jobs import Injection
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.subjects import GPU_WORLDS, REGISTERED, chosen, format_findings

MORE = 20  # random cases for each number of ranks
ON_GPUS = (*REGISTERED, "dispatchers:symmetric")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", chosen(metafunc.config, ON_GPUS))


@pytest.mark.parametrize("world", GPU_WORLDS)
def test_equals_the_dense_layer(impl: str, world: int) -> None:
    rng = random.Random(world)
    planned = list(cases.plan([world])) + [Planned("dense", cases.draw(rng, [world])) for _ in range(MORE)]
    refused, wrong = [], []
    for check, case in planned:
        verdict = judge.judge(impl, Planned(check, case).id, backend="nccl", budget=20)
        if verdict.unsupported is not None:
            refused.append(f"{verdict.case}: {verdict.unsupported}")
        if verdict.findings:
            wrong.append(format_findings(verdict))
        if len(wrong) == 3 or any(f.about == "ranks" for f in verdict.findings):
            break
    assert not wrong, "\n".join(wrong)
    assert not refused, "\n".join(refused)


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize(
    ("kind", "failure"),
    [("die", "died"), ("raise", "raised"), ("hang", "hang"), ("dtype", "mismatch"), ("split", "mismatch")],
)
def test_an_injected_fault_is_named(kind: str, failure: str) -> None:
    """Kernels that wait for a peer spin on the GPU; the controller sees the cause all the same, without a timeout.

    A rank that sleeps may still wake: only its budget ends that one.
    """
    case = "dispatcher/dense/R=2,E=4,k=2,T=3+2,seed=1"
    budget = {"budget": 5.0} if kind == "hang" else {}
    injection = Injection(kind, 1, 2)
    verdict = judge.judge("dispatchers:all_to_all_dedup", case, backend="nccl", injection=injection, **budget)
    assert verdict.failure is not None, format_findings(verdict)
    assert verdict.failure.kind == failure, verdict.failure.headline()
    # Of two ranks whose splits disagree neither is known to be the one that lies.
    assert verdict.failure.rank == 1 or kind == "split", verdict.failure.headline()
    assert "#2" in verdict.failure.call
    assert verdict.seconds < 10
    assert judge.judge("dispatchers:all_to_all_dedup", case, backend="nccl").passed
