"""The engine on Triton's kernels: under the interpreter on a CPU, as they are and with CUDA graphs on a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.runner import Filled
from moe_harness.impls.qwen3_moe.sequence import Request
from moe_harness.reference.model import Model as Reference
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable
TOKENS = 40 if CUDA else 3
SMALL: dict[str, Any] = {"page_size": 4, "max_sequences": 6, "max_tokens": 16, "pages": 60, "max_length": 80}
# Of Qwen3-Next, layers of both kinds, and layers that all attend.
NEXT: dict[str, dict[str, Any]] = {"hybrid": {}, "attending": {"full_attention_interval": 1}}
PROMPTS = [[(5 * n + 3 * p) % 128 for p in range(n)] for n in ((1, 4, 7, 33, 12, 29, 2) if CUDA else (1, 4, 7))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("model"), "qwen3_moe", dtype=torch.float32, num_hidden_layers=2)


@pytest.fixture(scope="module", params=NEXT)
def folder_of_next(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, changes = tmp_path_factory.mktemp(request.param), NEXT[request.param]
    return checkpoints.make(folder, "qwen3_next", dtype=torch.float32, **changes)


def model_of(folder: Path, kernels: str = "triton", **options: Any) -> Model:
    return load_model(folder, device=DEVICE, dtype="fp32", kernels=kernels, **SMALL | options)


def test_tokens_are_those_of_the_plain_kernels(folder: Path) -> None:
    """Prefill in chunks, decoding, pages of a pool."""
    found = {name: model_of(folder, name).generate(PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
             for name in ("triton", "torch")}  # fmt: skip
    assert found["triton"] == found["torch"]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v2", "qwen3_next"])
@torch.no_grad()
def test_logits_are_within_the_bound(family: str, tmp_path: Path) -> None:
    checkpoints.make(tmp_path, family)
    keys = checkpoints.config(family)
    ids = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    bound = logit_bound(Reference(keys, checkpoints.tensors(keys)), ids, torch.float32)
    logits = load_model(tmp_path, device=DEVICE, dtype="fp32", kernels="triton")(ids).cpu()
    assert bound.routed.double().mean() >= 0.5
    assert bound.z(logits)[bound.routed].abs().max() <= bounds.max_limit()


def test_a_padded_step_of_linear_attention_gives_the_right_logits(folder_of_next: Path) -> None:
    """As in a graph, behind a prompt in two chunks: one sequence, and pad rows, which write to no sequence."""
    keys = checkpoints.config("qwen3_next") | json.loads((folder_of_next / "config.json").read_text())
    model = model_of(folder_of_next, max_tokens=6, graphs=False)
    assert model.capturable
    engine, runner = model.engine, model.engine.runner
    engine.add(Request((5, 6, 7, 8, 9, 3, 1), 4))
    engine.step()
    engine.step()
    step = engine.scheduler.plan()
    assert step is not None
    last = int(runner.last_tokens[step.work[0].sequence.row])
    ids = torch.tensor([[5, 6, 7, 8, 9, 3, 1, last]])
    bound = logit_bound(Reference(keys, checkpoints.tensors(keys, dtype=torch.float32)), ids, torch.float32)
    with torch.inference_mode():
        runner.builder.carry(step, 3)
        padded = runner.run(Filled(3, 3, 3, 3, cut=False), padded=True)[0]
    logits = bound.value.clone()
    logits[0, -1] = padded[0].cpu().double()
    assert bound.routed[0, -1]
    assert bound.z(logits).abs().max() <= bounds.max_limit()
    assert padded.isfinite().all()


@pytest.mark.gpu
def test_graphs_of_linear_attention_give_the_tokens_of_plain_torch(folder_of_next: Path) -> None:
    """Every bucket up to 9, prompts in chunks beside sequences that decode, preemptions, and rows used again."""
    prompts = [[(7 * n + p) % 128 for p in range(2 + 3 * (n % 5))] for n in range(9)]
    counts, found = list(range(9, 18)), {}
    for kernels, graphs in (("triton", True), ("triton", False), ("torch", False)):
        model = model_of(folder_of_next, kernels, graphs=graphs, pages=26, max_sequences=6, max_length=40)
        found[kernels, graphs] = model.generate(prompts, max_new_tokens=counts, ignore_eos=True)
        assert model.engine.scheduler.preemptions > 0
        assert bool(model.engine.runner.graphs) == graphs
    assert found["triton", True] == found["triton", False] == found["torch", False]


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_plain_calls_at_every_batch_size(folder: Path) -> None:
    """Sequences end one after the other, so that every bucket and every number of pad rows is replayed."""
    prompts = [[n, n + 1] for n in range(24)]
    counts = list(range(3, 27))
    options = {"max_sequences": 24, "max_tokens": 64, "pages": 400}
    found = [
        model_of(folder, graphs=graphs, **options).generate(prompts, max_new_tokens=counts, ignore_eos=True)
        for graphs in (True, False)
    ]
    assert found[0] == found[1]


@pytest.mark.gpu
def test_nan_behind_every_pad_row_reaches_no_sequence(folder: Path) -> None:
    """A replay with NaN in all pages that no sequence holds gives the logits of a plain call without pads."""
    model = model_of(folder)
    engine = model.engine
    number = engine.add(Request((5, 6, 7), 4))
    engine.step()
    step = engine.scheduler.plan()
    assert step is not None
    runner, own = engine.runner, engine.sequences[number].table
    runner.cache.storage[:, :, [page for page in range(SMALL["pages"]) if page not in own]] = float("nan")
    before = runner.last_tokens.clone()
    with torch.inference_mode():
        alone = runner.run(runner.builder.carry(step))[0].clone()
        runner.last_tokens.copy_(before)
        runner.builder.carry(step, 6)
        padded = runner.run(Filled(6, 6, 6, 6, cut=False), padded=True)[0][:1]
        runner.last_tokens.copy_(before)
        runner.capture(6)
        runner.builder.carry(step, 6)
        runner.last_tokens.copy_(before)
        graph, logits, _ = runner.graphs[6]
        graph.replay()
    assert torch.equal(logits[:1], padded), "a graph gives other logits than the same calls without it"
    assert logits[:1].isfinite().all()
    assert int(logits[0].argmax()) == int(alone[0].argmax())


def test_a_stopped_and_a_preempted_sequence_give_the_tokens_of_undisturbed_ones(folder: Path) -> None:
    if not CUDA:
        pytest.skip("minutes under the interpreter; the same engine runs on plain kernels in test_planted.py")
    wanted = model_of(folder, pages=400, max_sequences=8).generate(PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    tight = model_of(folder, pages=20, max_sequences=8)
    assert tight.generate(PROMPTS, max_new_tokens=TOKENS, ignore_eos=True) == wanted
    assert tight.engine.scheduler.preemptions > 0
    stop = wanted[3][7]
    cut = tight.generate(PROMPTS[3:4], max_new_tokens=TOKENS, stop_token_ids=[stop], ignore_eos=True)
    assert cut == [wanted[3][: wanted[3].index(stop) + 1]]
