"""A server that speaks OpenAI's completions: vLLM, SGLang, llama.cpp and others.

What runs behind an address cannot be read from here: its answers serve an interrupted run to go on, and no later one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_harness.harness.core import http
from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate.answerers.finding import Settings
from moe_harness.harness.gate.exchange import LIKELIEST, Answer, Gold, Request

TIMEOUT = 600.0  # seconds for one answer


class Server:
    """`http://host:port/v1#model`; `batch_size` requests are under way at a time."""

    traceable = False

    def __init__(self, spec: str, settings: Settings):
        self.address, _, self.model = spec.partition("#")
        self.address = self.address.rstrip("/")
        self.settings = settings
        offered = [entry["id"] for entry in self._get("/models").get("data", [])]
        if not self.model and len(offered) == 1:
            self.model = offered[0]
        if self.model not in offered:
            raise UsageError(f"{self.address} offers {', '.join(offered) or 'no model'}; write {self.address}#MODEL")
        self.scores_prompts = True  # until it refuses

    def identity(self) -> dict[str, Any]:
        return {"spec": f"{self.address}#{self.model}", "batch_size": self.settings.batch_size}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Answer:
        found = self._post({
            "prompt": request.prompt, "max_tokens": request.max_new_tokens, "temperature": request.temperature,
            "stop": list(request.until) or None, "seed": request.repeat,
        })  # fmt: skip
        choice = found["choices"][0]
        length = (found.get("usage") or {}).get("completion_tokens") or len(choice["text"].split())
        stop = "length" if choice.get("finish_reason") == "length" else "stop"
        return Answer(request.key, choice["text"], int(length), stop, self._gold(request))

    def _gold(self, request: Request) -> Gold | None:
        """The gold answer's log-likelihood, where the server scores the tokens of a prompt (`echo`)."""
        if not self.scores_prompts:
            return None
        try:
            found = self._post({
                "prompt": request.prompt + request.gold, "max_tokens": 1, "temperature": 0.0, "echo": True,
                "logprobs": LIKELIEST,
            })["choices"][0]["logprobs"]  # fmt: skip
            offsets, values = found["text_offset"], found["token_logprobs"]
        except (CannotJudge, KeyError, TypeError):
            self.scores_prompts = False
            return None
        end = len(request.prompt) + len(request.gold)
        each = [v for at, v in zip(offsets, values, strict=False) if len(request.prompt) <= at < end and v is not None]
        return Gold(sum(each), (), (), ()) if each else None

    def _get(self, path: str) -> dict[str, Any]:
        return http.get(self.address + path, TIMEOUT)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        return http.post(f"{self.address}/completions", {"model": self.model, **body}, TIMEOUT)
