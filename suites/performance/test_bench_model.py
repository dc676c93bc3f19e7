"""Whole models are timed for what they were asked for, each in a process of its own."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moe_harness.harness.bench import serving
from moe_harness.harness.commands.bench_model import span
from moe_harness.harness.core.errors import CannotJudge, UsageError

WORK = serving.Workload(requests=3, prompt=(2, 4), new=(5, 9), runs=2)
MODELS = """
import os


class Model:
    def __init__(self, less=0):
        self.less = less

    def generate(self, prompts, *, max_new_tokens, temperature=0.0, seed=0, stop_token_ids=(), ignore_eos=False):
        assert ignore_eos
        return [[(sum(p) + i) % 11 for i in range(n - self.less)] for p, n in zip(prompts, max_new_tokens)]


def right(model_dir, *, device, dtype, group=None, expert_parallel=False, dispatcher=""):
    return Model()


def short(model_dir, *, device, dtype, group=None, expert_parallel=False, dispatcher=""):
    return Model(less=1)


def dies(model_dir, *, device, dtype, group=None, expert_parallel=False, dispatcher=""):
    os._exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 11}))
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


def test_every_run_is_timed_over_the_tokens_that_were_asked_for(folder: Path) -> None:
    found = serving.timed(f"{folder}/models.py:right", folder, WORK, "cpu", "fp32")
    assert len(found.tokens_per_second) == 2 and min(found.tokens_per_second) > 0 and found.warm_up > 0
    assert [len(ids) for ids in found.greedy] == [serving.SHORT_NEW] * len(serving.SHORT)
    other = serving.ModelTiming("other", greedy=[[*ids[:-4], *[-1] * 4] for ids in found.greedy])
    assert found.agreement(found) == 1 and other.agreement(found) == 0.75


def test_an_answer_of_another_length_ends_the_timing(folder: Path) -> None:
    with pytest.raises(CannotJudge, match="15 tokens for prompt 0 of 4, but 16 were asked for"):
        serving.timed(f"{folder}/models.py:short", folder, WORK, "cpu", "fp32")


def test_a_model_that_dies_costs_the_next_one_nothing(folder: Path) -> None:
    specs = [f"{folder}/models.py:{name}" for name in ("dies", "missing", "right")]
    dies, missing, right = serving.bench(specs, folder, WORK, device="cpu", dtype="fp32")
    assert dies.refused == "its process died with status 7" and "missing" in missing.refused
    assert not right.refused and len(right.tokens_per_second) == 2
    written = json.loads(serving.as_json([dies, right], WORK, device="cpu"))
    assert [model["refused"] for model in written["models"]] == [dies.refused, ""]


def test_the_same_seed_asks_the_same() -> None:
    assert WORK.drawn(11) == WORK.drawn(11) != serving.Workload(requests=3, prompt=(2, 4), new=(5, 9), seed=1).drawn(11)


@pytest.mark.parametrize("text", ["", "9-3", "0", "many", "-4"])
def test_a_span_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--new-tokens"):
        span("new-tokens", text)


class Completions(BaseHTTPRequestHandler):
    """A server that answers as many tokens as asked; a model called "bare" tells no ids, "odd" no tokens at all."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["ignore_eos"] and isinstance(asked["prompt"][0], int)
        choice = {"token_ids": asked["prompt"][:1] * asked["max_tokens"]} if asked["model"] == "tiny" else {}
        usage = {} if asked["model"] == "odd" else {"usage": {"completion_tokens": asked["max_tokens"]}}
        body = json.dumps({"choices": [choice], **usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def test_a_server_is_timed_by_the_tokens_that_it_made(folder: Path, address: str) -> None:
    found = serving.timed(f"{address}#tiny", folder, WORK, "cpu", "fp32")
    assert len(found.tokens_per_second) == 2 and found.greedy[0] == [3] * serving.SHORT_NEW
    bare = serving.timed(f"{address}#bare", folder, WORK, "cpu", "fp32")
    assert bare.greedy[0] == [-1] * serving.SHORT_NEW and bare.agreement(found) == 0


def test_what_is_no_such_server_is_told_by_its_address(folder: Path, address: str) -> None:
    with pytest.raises(CannotJudge, match=r"/v1/completions does not answer as OpenAI's.*usage"):
        serving.timed(f"{address}#odd", folder, WORK, "cpu", "fp32")
    with pytest.raises(CannotJudge, match=r"127.0.0.1:9/v1/completions cannot be reached"):
        serving.timed("http://127.0.0.1:9/v1#tiny", folder, WORK, "cpu", "fp32")
