"""The same judgement over workers that torchrun started: two agents on this machine, two ranks each."""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.remote import RemoteMember

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from moe_harness.harness.ranks import judge
from moe_harness.harness.ranks.jobs import Injection
case = "dispatcher/dense/R=4,E=3,k=1,T=0+2+1+3"
for _ in range(3):
    assert judge.judge("dispatchers:all_to_all", case).passed
died = judge.judge("dispatchers:all_to_all", case, injection=Injection("die", 2, 1)).failure
print(died.kind, died.rank)
stuck = judge.judge("moe_harness.harness.stages.dispatcher.faults.collectives:empty_rank_skips", case).failure
print(stuck.kind, stuck.rank)
assert judge.judge("dispatchers:all_to_all_dedup", "dispatcher/dense/R=2,E=3,k=1,T=3+2").passed
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """What the controller needs to find the servers of two torchrun agents."""
    address, master = f"127.0.0.1:{_free_port()}", str(_free_port())
    shared = {**os.environ, "MOE_HARNESS_RANKS_KEY": secrets.token_hex(16), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    where = ["--master-addr=127.0.0.1", f"--master-port={master}", "-m", "moe_harness.harness.ranks.serve", address]
    agents = [
        subprocess.Popen([*command, f"--node-rank={node}", *where], env=shared, stderr=subprocess.DEVNULL)
        for node in range(2)
    ]
    yield {**shared, "MOE_HARNESS_RANKS": address}
    for agent in agents:
        agent.terminate()
    for agent in agents:
        agent.wait(30)


def test_two_agents_and_one_controller(environment: dict[str, str]) -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=180)
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.split() == ["died", "2", "deadlock", "0"]


def test_without_a_secret_it_says_what_is_missing() -> None:
    call = "judge.judge('dispatchers:naive', 'dispatcher/dense/R=1,E=1,k=1,T=1')"
    program = f"from moe_harness.harness.ranks import judge; {call}"
    alone = {**os.environ, "MOE_HARNESS_RANKS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    alone.pop("MOE_HARNESS_RANKS_KEY", None)
    said = subprocess.run([sys.executable, "-c", program], env=alone, capture_output=True, text=True, timeout=60)
    assert "MOE_HARNESS_RANKS_KEY has to hold the same secret" in said.stderr


class Scripted:
    """The end of a connection on which a server has said all of this already."""

    def __init__(self, *messages: tuple[str, object]):
        self.messages = list(messages)

    def send(self, message: object) -> None:
        pass

    def poll(self, seconds: float) -> bool:
        return bool(self.messages)

    def recv(self) -> tuple[str, object]:
        return self.messages.pop(0)


def test_what_comes_before_an_answer_is_read_after_it_in_order() -> None:
    beat = (RankStatus(7, State.IDLE), 3, False)
    member = RemoteMember(0, Scripted(("reply", "first"), ("beat", beat), ("reply", "second"), ("calls", [])), None)
    assert member.calls() == [] and member.beat() == beat[0]
    assert [member.receive(), member.receive()] == ["first", "second"]
