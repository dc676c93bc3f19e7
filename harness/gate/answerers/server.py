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
        offered = _offered(self.address, self._get("/models"))
        if not self.model and len(offered) == 1:
            self.model = offered[0]
        if self.model not in offered:
            raise UsageError(f"{self.address} offers {', '.join(offered) or 'no model'}; write {self.address}#MODEL")
        self.scores_prompts: bool | None = None  # until it has done so, or refused

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
        choice = _choice(self.address, found)
        length = (found.get("usage") or {}).get("completion_tokens")
        stop = "length" if choice.get("finish_reason") == "length" else "stop"
        counted = length if isinstance(length, int) else None
        return Answer(request.key, choice["text"], counted, stop, self._gold(request))

    def _gold(self, request: Request) -> Gold | None:
        """The gold answer's log-likelihood, where the server scores the tokens of a prompt (`echo`)."""
        if self.scores_prompts is False:
            return None
        try:
            found = self._post({
                "prompt": request.prompt + request.gold, "max_tokens": 1, "temperature": 0.0, "echo": True,
                "logprobs": LIKELIEST,
            })["choices"][0]["logprobs"]  # fmt: skip
            offsets, values = found["text_offset"], found["token_logprobs"]
        except (CannotJudge, KeyError, IndexError, TypeError):
            if self.scores_prompts:  # it can, so this is a failure
                raise
            self.scores_prompts = False
            return None
        self.scores_prompts = True
        end = len(request.prompt) + len(request.gold)
        each = [v for at, v in zip(offsets, values, strict=False) if len(request.prompt) <= at < end and v is not None]
        return Gold(sum(each), (), (), ()) if each else None

    def _get(self, path: str) -> dict[str, Any]:
        return http.get(self.address + path, TIMEOUT)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        return http.post(f"{self.address}/completions", {"model": self.model, **body}, TIMEOUT)


def _offered(address: str, found: dict[str, Any]) -> list[str]:
    """Names of the models that a server offers."""
    try:
        return [str(entry["id"]) for entry in found["data"]]
    except (KeyError, TypeError) as error:
        raise CannotJudge(
            f'{address}/models answered {str(found)[:80]}, but should answer {{"data": [{{"id": MODEL}}, ...]}}; '
            "an address usually ends in /v1"
        ) from error


def _choice(address: str, found: dict[str, Any]) -> dict[str, Any]:
    """The one completion; CannotJudge where there is no text, which is another thing than an empty one."""
    try:
        choice = found["choices"][0]
        if isinstance(choice["text"], str):
            return dict(choice)
    except (KeyError, IndexError, TypeError):
        pass
    raise CannotJudge(
        f'{address}/completions answered {str(found)[:120]}, but should answer {{"choices": [{{"text": "..."}}], ...}}'
    )
