"""A server as an answerer: what it says is taken, and what is no answer is a failure of the run and no wrong answer."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate.answerers import Settings, find
from moe_harness.suites.accuracy.test_answerers import requests, texts


class Completions(BaseHTTPRequestHandler):
    """A server that answers every question with 42."""

    broken = False
    said: bytes | None = None  # instead of an answer
    counts = True
    models: Any = {"data": [{"id": "tiny"}]}  # noqa: RUF012

    def do_GET(self):
        self._send(self.models)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.broken:
            self.send_error(500)
            return
        if self.said is not None:
            self._say(self.said)
            return
        text, choice = asked["prompt"], {"text": " 42", "finish_reason": "stop"}
        if asked.get("echo"):
            offsets = list(range(len(text) + 1))
            choice["logprobs"] = {"text_offset": offsets, "token_logprobs": [None, *[-0.5] * len(text)]}
        self._send({"choices": [choice], **({"usage": {"completion_tokens": 2}} if self.counts else {})})

    def _send(self, value):
        self._say(json.dumps(value).encode())

    def _say(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(max(len(body), 9)))  # b"" breaks off
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("broken", "said", "counts", "models"):
        monkeypatch.setattr(Completions, name, getattr(Completions, name))
    running = HTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_a_server_answers(server):
    asked = requests(3)
    answers = find(server, Settings(None, batch_size=2)).answer(asked)
    assert texts(answers) == [" 42"] * 3
    assert [a.length for a in answers] == [2] * 3
    assert answers[0].gold.loglikelihood == pytest.approx(-0.5 * len(asked[0].gold))


def test_a_server_that_fails_is_no_wrong_answer(server, monkeypatch):
    found = find(server, Settings(None))
    monkeypatch.setattr(Completions, "broken", True)
    with pytest.raises(CannotJudge, match="500"):
        found.answer(requests(1))
    with pytest.raises(CannotJudge, match="cannot be reached"):
        find("http://127.0.0.1:9/v1", Settings(None))
    with pytest.raises(UsageError, match="offers tiny"):
        find(f"{server}#large", Settings(None))


@pytest.mark.parametrize(
    ("said", "told"),
    [(b'{"answer": 42}', "should answer .*choices"), (b'{"choices": []}', "should answer .*choices"),
     (b'{"choices": [{"text": null}]}', "should answer .*choices"), (b"[1, 2, 3]", "a JSON object"),
     (b"<html></html>", "does not answer in JSON"), (b"", "cannot be reached")],
)  # fmt: skip
def test_what_is_no_answer_is_told_as_what_came(server, monkeypatch, said, told):
    found = find(server, Settings(None))
    monkeypatch.setattr(Completions, "said", said)
    with pytest.raises(CannotJudge, match=told):
        found.answer(requests(1))


@pytest.mark.parametrize("models", [{"models": []}, {"data": [1]}, {"data": None}])
def test_an_address_without_models_is_told(server, monkeypatch, models):
    monkeypatch.setattr(Completions, "models", models)
    with pytest.raises(CannotJudge, match="usually ends in /v1"):
        find(server, Settings(None))


def test_lengths_that_a_server_does_not_tell_are_not_made_up(server, monkeypatch):
    """A number of words beside a number of tokens would be another mean length, and a fail."""
    monkeypatch.setattr(Completions, "counts", False)
    assert [a.length for a in find(server, Settings(None)).answer(requests(2))] == [None, None]


def test_gold_answers_that_stop_coming_are_a_failure_and_not_a_refusal(server, monkeypatch):
    """A server that refuses to score prompts does so at once."""
    found = find(server, Settings(None))
    (request,) = requests(1)
    assert found._gold(request) is not None
    monkeypatch.setattr(Completions, "broken", True)
    with pytest.raises(CannotJudge, match="500"):
        found._gold(request)
    refusing = find(server, Settings(None))
    assert refusing._gold(request) is None
