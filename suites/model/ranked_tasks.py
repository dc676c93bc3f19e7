"""What one rank of the pool does for a cell of the coverage: the model over ranks, and on rank 0 the model on one."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.harness.ranks.launch import Member
from moe_harness.impls.qwen3_moe.batch import Filled
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.ranks import Ranks, RanksDiffer
from moe_harness.impls.qwen3_moe.sequence import Request
from moe_harness.impls.torch.cut import kept
from moe_harness.suites.model import planted_ranks

ENGINE: dict[str, Any] = {"page_size": 4, "max_sequences": 6, "max_tokens": 12, "pages": 40, "max_length": 60}
PROMPTS = [[(7 * n + p) % 128 for p in range(n)] for n in (1, 3, 4, 9, 14, 2)]
IDS = [[(11 * row + 5 * p + p * p) % 128 for p in range(7)] for row in range(2)]


@dataclass(frozen=True)
class Cell:
    """A layout of a family over `ranks`; what the row of the coverage list says.

    `changes` are keys of config.json, `options` arguments of load_model.
    """

    family: str
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp64"

    def spec(self, folder: Any) -> dict[str, Any]:
        return {**asdict(self), "folder": str(folder)}


def load(spec: dict[str, Any], group: Any = None, **options: Any) -> Model:
    """The model of a cell on the device of its spec, over the ranks of `group` where there is one."""
    device = spec.get("device", "cpu")
    if spec["options"].get("dispatcher") == "symmetric" and device == "cpu":
        interpret_symmetric()
    given = ENGINE | ({"group": group, **spec["options"]} if group is not None else {}) | options
    place = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    if spec["dtype"] == "fp64":
        given["kernels"] = "torch"  # Triton's take no fp64
    return load_model(spec["folder"], device=place, dtype=DTYPES[spec["dtype"]], **given)


@cache
def interpret_symmetric() -> None:
    """Put the interpreted kernels in the place of those that need NVLink."""
    from moe_harness.impls.dispatchers import dispatcher
    from moe_harness.suites.dispatcher.interpreted import Symmetric

    dispatcher.symmetric = Symmetric  # type: ignore[misc]


def digest(*tensors: Tensor) -> str:
    return hashlib.sha1(b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def watched(model: Model, name: str) -> list[Tensor]:
    """What the kernel `name` of a model gives from now on: of the router the ids."""
    seen: list[Tensor] = []
    kernel: Callable[..., Any] = getattr(model.network.kernels, name)

    def watch(*args: Any, **options: Any) -> Any:
        result = kernel(*args, **options)
        seen.append((result[1] if isinstance(result, tuple) else result).clone())
        return result

    object.__setattr__(model.network.kernels, name, watch)
    return seen


def answers(model: Model) -> dict[str, Any]:
    """Logits of IDS, the router's choices for them, greedy and drawn tokens of PROMPTS."""
    chosen = watched(model, "router")
    logits = model(torch.tensor(IDS))
    found: dict[str, Any] = {"logits": logits.clone(), "chosen": [ids.tolist() for ids in chosen]}
    found["greedy"] = model.generate(PROMPTS, max_new_tokens=4, ignore_eos=True)
    found["drawn"] = model.generate(PROMPTS, max_new_tokens=4, ignore_eos=True, temperature=16.0, seed=3)
    model.engine.check()
    found["live"], found["padded"] = padded_step(model)
    return found


def padded_step(model: Model) -> tuple[int, Tensor]:
    """A decoding step of one sequence, padded to five, which ranks do not divide, as a graph holds it.

    Returns:
        how many slots the experts of this rank are given, and the logits [V] of the one sequence.
    """
    engine, device, seen = model.engine, model.engine.runner, 0
    kernel = model.network.kernels.experts

    def watch(*args: Any, **options: Any) -> Tensor:
        nonlocal seen
        ids, local = args[4], options.get("expert_map")
        seen += int(((ids if local is None else local[ids.clamp(min=0).long()].masked_fill(ids < 0, -1)) >= 0).sum())
        return kernel(*args, **options)

    engine.add(Request((5, 6, 7), 4))
    engine.step()
    step = engine.scheduler.plan()
    assert step is not None and step.decoding == len(step.work) == 1
    object.__setattr__(model.network.kernels, "experts", watch)
    with torch.inference_mode():
        filled = device.builder.carry(step, 5)
        logits, _ = device.run(Filled(5, 5, 5, 5, filled.cut), padded=True)
    object.__setattr__(model.network.kernels, "experts", kernel)
    return seen, model.network.whole(logits)[0].clone()


@cache
def alone(folder: str, device: str = "cpu") -> dict[str, Any]:
    """The answers of one rank, kept for all cells of a checkpoint."""
    return answers(load({"folder": folder, "options": {}, "dtype": "fp64", "device": device}))


def cell(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every rank's answers, and on rank 0 the distance to those of one rank."""
    spread = load(spec, me.group)
    found = answers(spread)
    logits = {name: found.pop(name) for name in ("logits", "padded")}
    told = found | {"digest": digest(*logits.values()), "backend": spread.expert_parallel_backend}
    if me.rank == 0:
        one = alone(spec["folder"], spec.get("device", "cpu"))
        told["error"] = max(float((got - one[n]).abs().max() / one[n].abs().max()) for n, got in logits.items())
        told["one"] = {key: value for key, value in one.items() if key not in logits}
    return told


def forward(me: Rank, spec: dict[str, Any], seed: int) -> int:
    """One forward, for its collectives; returns how many calls came before it."""
    model = load(spec, me.group)
    before = len(me.recorder.calls)
    model(torch.tensor(IDS))
    return before


def few_tokens(me: Rank, spec: dict[str, Any], seed: int) -> str:
    """The logits of three tokens for each rank, which is what the interpreted kernels have time for."""
    return digest(load(spec, me.group)(torch.tensor(IDS)[:, :3]))


CUTS: tuple[dict[str, Any], ...] = (
    {"top_k": 1}, {"top_k": 5}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.5}, {"top_k": 500}, {},
)  # fmt: skip


def cut_tokens(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Drawn tokens of requests with cuts beside some without, over ranks and, on rank 0, on one."""
    requests = [
        Request(tuple(PROMPTS[i % len(PROMPTS)]), 3, 8.0, seed=i, **CUTS[i % len(CUTS)]) for i in range(3 * len(CUTS))
    ]
    model = load(spec, me.group)
    with pytest.MonkeyPatch.context() as patch:
        for name, change in CUT_FAULTS.get(spec.get("fault", ""), {}).items():
            patch.setattr(Ranks, name, change)
        before = len(me.recorder.calls)
        found = {"spread": model.engine.generate(requests)}
    found["largest"] = max(call.sent for call in me.recorder.calls[before:])
    if me.rank == 0:
        found["one"] = load(spec).engine.generate(requests)
    return found


CUT_FAULTS: dict[str, dict[str, Any]] = {
    "the_nucleus_of_each_shard": {"total": lambda self, numbers: numbers},
    "the_top_of_each_shard": {"largest": lambda self, values: values},
}


def cut_rows(me: Rank, spec: dict[str, Any], seed: int) -> list[str]:
    """Random rows, many of them with equal logits: what shards keep is what a sort keeps; returns what differs."""
    random, wrong = torch.Generator().manual_seed(seed), []
    ranks = Ranks(me.group, torch.device("cpu"))
    for trial in range(40):
        batch, vocabulary = (int(torch.randint(*span, (1,), generator=random)) for span in ((1, 5), (3, 60)))
        logits = torch.randn(batch, vocabulary, generator=random) * 3
        logits = logits.round() if trial % 2 else logits.double()
        logits[:, 0] = -torch.inf if trial % 5 == 0 else logits[:, 0]
        scores = logits - logits.amax(1, keepdim=True)
        top_k = torch.randint(0, vocabulary + 3, (batch,), generator=random) if trial % 3 else None
        top_p = torch.rand(batch, generator=random) * 1.1 if trial % 4 else None
        found = kept(scores.tensor_split(me.world_size, 1)[me.rank], top_k, top_p, vocabulary, ranks)
        wanted = sorted_cut(scores, top_k, top_p).tensor_split(me.world_size, 1)[me.rank]
        wrong += [] if torch.equal(found, wanted) else [f"trial {trial}, {batch} rows of {vocabulary}"]
    return wrong


def sorted_cut(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """What top_k and then top_p keep of whole rows, bool [B, V], from a sort."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    left = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        left = (torch.arange(scores.shape[1]) < top_k[:, None]) | (top_k < 1)[:, None]
    if top_p is not None:
        weights = ordered.double().exp().masked_fill(~left, 0.0)
        reached = weights.cumsum(1) - weights
        left = left & ((reached < top_p.double()[:, None] * weights.sum(1, keepdim=True)) | (top_p >= 1)[:, None])
    left[:, :1] = True
    return torch.zeros_like(left).scatter(1, order, left)


def other_prompts(me: Rank, spec: dict[str, Any], seed: int) -> str:
    """What `generate` says where rank 1 is given other prompts than rank 0."""
    with pytest.raises(RanksDiffer) as told:
        load(spec, me.group).generate([[1, 2 + me.rank]], max_new_tokens=2)
    return str(told.value)


def dies(me: Member, spec: dict[str, Any]) -> None:
    """Rank 1 is killed in the middle of generating, after it has written when into the file `spec["died"]`."""
    model = load(spec, me.group)
    launch, steps = model.engine.runner.launch, iter(range(12))

    def counted(step: Any) -> Any:
        if next(steps, None) is None and me.rank == 1:
            Path(spec["died"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(step)

    model.engine.runner.launch = counted  # type: ignore[method-assign]
    model.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)


def complains(me: Member, spec: dict[str, Any]) -> None:
    """Rank 1 raises, and rank 0 waits for it."""
    model = load(spec, me.group)
    if me.rank == 1:
        raise KeyError("nothing of the kind")
    model(torch.tensor(IDS))


def faulty(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """A cell with a fault put in on every rank, and taken out again."""
    if me.rank == 0:
        alone(spec["folder"], spec.get("device", "cpu"))  # as `cell` asks for it, before the fault is there
    with pytest.MonkeyPatch.context() as patch:
        planted_ranks.FAULTS[spec["fault"]].plant(patch, me.rank)
        return cell(me, spec, seed)
