"""Time whole models on one workload: output tokens/s of any `load_model`, and of servers with OpenAI's completions.

Each model is loaded in a process of its own, one after the other: two of them seldom fit one card.  Before it is timed
it answers short prompts greedily; the share of tokens on which it agrees with the first model is told, since a model
that answers something else may be fast for that.  An answer of another length than asked ends its timing: what is
counted has to have been made.
"""

import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moe_harness.harness.core import http
from moe_harness.harness.core.errors import CannotJudge, HarnessError
from moe_harness.harness.process.start import start

BUDGET = 3600.0  # seconds for one model, loading included
SHORT, SHORT_NEW = (3, 7, 12, 20), 16  # lengths of the prompts that are answered greedily first, and tokens of each
TEMPERATURE = 0.6  # as nano-vllm's benchmark has it
ANSWER_SECONDS = 1200.0  # for one answer of a server


@dataclass(frozen=True)
class Workload:
    """Requests of random ids; `prompt` and `new` are the least and the most tokens of each."""

    requests: int = 256
    prompt: tuple[int, int] = (100, 1024)
    new: tuple[int, int] = (100, 1024)
    runs: int = 5
    seed: int = 0

    def drawn(self, vocabulary: int) -> tuple[list[list[int]], list[int]]:
        """Prompts, and how many tokens are asked for."""
        rng = random.Random(self.seed)
        prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(*self.prompt))] for _ in range(self.requests)]
        return prompts, [rng.randint(*self.new) for _ in range(self.requests)]


@dataclass
class ModelTiming:
    """What was found of one model; `refused` says why there are no times."""

    spec: str
    load_seconds: float = 0.0
    warm_up: float = 0.0  # output tokens/s of the first run, which compiles and captures
    tokens_per_second: list[float] = field(default_factory=list)  # of each run after it
    peak_memory: int = 0  # bytes allocated on the device
    greedy: list[list[int]] = field(default_factory=list)
    refused: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    def agreement(self, first: "ModelTiming") -> float:
        """The share of greedy tokens that are those of `first`."""
        pairs = [p for a, b in zip(self.greedy, first.greedy, strict=True) for p in zip(a, b, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)


def bench(
    specs: Sequence[str],
    folder: Path,
    workload: Workload,
    *,
    device: str,
    dtype: str,
    progress: Callable[[str], None] = lambda text: None,
) -> list[ModelTiming]:
    """Time models one after the other; what one of them does wrong costs the others nothing."""
    found = []
    for spec in specs:
        progress(f"{spec}: loading")
        found.append(_in_a_process(spec, folder, workload, device, dtype))
        told = found[-1].refused or f"{found[-1].median:,.0f} output tokens/s"
        progress(f"{spec}: {told}")
    return found


def _in_a_process(spec: str, folder: Path, workload: Workload, device: str, dtype: str) -> ModelTiming:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, spec, str(folder), workload, device, dtype), daemon=True)
    start(process)
    theirs.close()
    try:
        return ours.recv() if ours.poll(BUDGET) else ModelTiming(spec, refused=f"not done after {BUDGET:.0f} s")
    except EOFError:
        process.join(5)
        return ModelTiming(spec, refused=f"its process died with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, spec: str, folder: str, workload: Workload, device: str, dtype: str) -> None:
    try:
        connection.send(timed(spec, Path(folder), workload, device, dtype))
    except HarnessError as error:
        connection.send(ModelTiming(spec, refused=str(error)))
    except Exception as error:
        connection.send(ModelTiming(spec, refused=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"))


def timed(spec: str, folder: Path, workload: Workload, device: str, dtype: str) -> ModelTiming:
    """Load and time one model in this process.

    Raises:
        HarnessError: it cannot be found, or does not answer as asked; whatever the model itself raises.
    """
    began = time.perf_counter()
    model = HttpEngine(spec) if spec.startswith(("http://", "https://")) else _loaded(spec, folder, device, dtype)
    found = ModelTiming(spec, load_seconds=time.perf_counter() - began)
    keys = json.loads((folder / "config.json").read_text())
    vocabulary = keys.get("vocab_size") or keys["text_config"]["vocab_size"]
    short = [[(7 * i + n) % vocabulary for i in range(n)] for n in SHORT]
    found.greedy = _asked(model, short, [SHORT_NEW] * len(short), 0.0)
    prompts, counts = workload.drawn(vocabulary)
    for run in range(1 + workload.runs):
        _wait_for(device)
        began = time.perf_counter()
        _asked(model, prompts, counts, TEMPERATURE)
        _wait_for(device)
        rate = sum(counts) / (time.perf_counter() - began)
        if run:
            found.tokens_per_second.append(rate)
        else:
            found.warm_up = rate
    if device == "cuda":
        import torch

        found.peak_memory = torch.cuda.max_memory_allocated()
    return found


def _loaded(spec: str, folder: Path, device: str, dtype: str) -> Any:
    from moe_harness.harness.core.bounds import DTYPES
    from moe_harness.harness.core.contracts import load

    return load("model", spec).function(str(folder), device=device, dtype=DTYPES[dtype])


def _asked(model: Any, prompts: list[list[int]], counts: list[int], temperature: float) -> list[list[int]]:
    """New tokens of each prompt, exactly as many as asked for."""
    new = model.generate(prompts, max_new_tokens=counts, temperature=temperature, seed=1, ignore_eos=True)
    lengths = [len(ids) for ids in new]
    if lengths != counts:
        wrong = next((i for i, pair in enumerate(zip(lengths, counts, strict=False)) if pair[0] != pair[1]), len(new))
        got = f"{lengths[wrong]} tokens" if wrong < len(new) else "no answer"
        wanted = f"{counts[wrong]} were asked for (ignore_eos=True)"
        raise CannotJudge(f"generate gave {got} for prompt {wrong} of {len(prompts)}, but {wanted}")
    return [[int(token) for token in ids] for ids in new]


def _wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class HttpEngine:
    """`http://host:port/v1#model`: every request is sent at once, the server batches them."""

    def __init__(self, spec: str):
        self.address, _, self.model = spec.partition("#")

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: list[int], temperature: float, seed: int, ignore_eos: bool
    ) -> list[list[int]]:
        """Tokens of each answer; where the server tells no ids, as many -1 as it says that it made."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            bodies = [
                {"model": self.model, "prompt": prompt, "max_tokens": count, "temperature": temperature, "seed": seed,
                 "ignore_eos": ignore_eos, "return_token_ids": True}
                for prompt, count in zip(prompts, max_new_tokens, strict=True)
            ]  # fmt: skip
            return list(pool.map(self._one, bodies))

    def _one(self, body: dict[str, Any]) -> list[int]:
        address = self.address.rstrip("/") + "/completions"
        found = http.post(address, body, ANSWER_SECONDS)
        try:
            return found["choices"][0].get("token_ids") or [-1] * found["usage"]["completion_tokens"]
        except (KeyError, IndexError, TypeError) as error:
            raise CannotJudge(f"{address} does not answer as OpenAI's completions do: {error!r} is missing") from error


def as_json(found: list[ModelTiming], workload: Workload, **about: Any) -> str:
    """The figures with what they were made of."""
    return json.dumps({"schema": 1, "stage": "model", **about, "workload": asdict(workload),
                       "models": [asdict(timing) for timing in found]}, indent=1)  # fmt: skip
