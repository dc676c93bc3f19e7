"""Every published bug that can be planted in the engine is seen; the right engine passes the same checks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.impls.qwen3_moe import runner
from moe_harness.impls.qwen3_moe.config import CheckpointError, Config
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.sequence import Request
from moe_harness.suites.model import machine, test_engine
from moe_harness.suites.model.planted import FAULTS

OPTIONS: dict[str, Any] = {"page_size": 4, "max_sequences": 20, "max_tokens": 24, "pages": 60, "max_length": 60}


def run_machine(histories: int = 1000) -> None:
    """The state machine without shrinking: what fails is enough."""
    quick = settings(max_examples=histories, stateful_step_count=30, phases=[Phase.generate])
    run_state_machine_as_test(machine.EngineMachine, settings=quick)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("model"), "qwen3_moe", dtype=torch.float32)


def check_network(folder: Path) -> None:
    """Decode with cache = chunked = full forward, many rows together = alone, pad rows inert."""
    model = load_model(folder, device="cpu", dtype=torch.float64, **OPTIONS)
    prompts = [[(3 * n + 5 * p) % 128 for p in range(n)] for n in (1, 4, 5, 18, 33)] + [[7, n] for n in range(12)]
    found = model.generate(prompts, max_new_tokens=6, ignore_eos=True)
    for prompt, new in zip(prompts, found, strict=True):
        assert new == greedy(model, prompt, new), f"{prompt} gave {new}"
    check_pads(model)


def greedy(model: Model, prompt: list[int], new: list[int]) -> list[int]:
    """The largest logit after each token, in one forward over all of them by the reference."""
    from moe_harness.reference.model import Model as Reference

    keys = checkpoints.config("qwen3_moe")
    reference = Reference(keys, checkpoints.tensors(keys, 0, torch.float32))
    logits = reference(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist()


def check_pads(model: Model) -> None:
    """Padded to a larger batch, with NaN in every cache page that is not its own, a step gives the same logits."""
    engine = model.engine
    number = engine.add(Request((5, 6, 7), 4))
    engine.step()
    launched = engine.scheduler.plan()
    assert launched is not None
    seen: list[torch.Tensor] = []
    experts = model.network.kernels.experts
    device = engine.runner
    own = engine.sequences[number].table
    device.cache.storage[:, :, [p for p in range(OPTIONS["pages"]) if p not in own]] = float("nan")

    def watch(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(args[4])
        return experts(*args, **options)

    object.__setattr__(model.network.kernels, "experts", watch)
    with torch.inference_mode():
        before = device.last_tokens.clone()
        alone, _ = device.run(device.builder.carry(launched))
        device.last_tokens.copy_(before)
        filled = device.builder.carry(launched, 6)
        padded, _ = device.run(runner.Filled(6, 6, 6, 6, filled.cut), padded=True)
    error = (padded[:1] - alone).abs().max() / alone.abs().max()
    assert error <= bounds.SAME_IN_FP64, "pad rows change a sequence's logits"
    assert all(bool((ids[1:] == -1).all()) for ids in seen if len(ids) == 6), "pad rows read experts"


def check_functions() -> None:
    """Checks of single functions, which have tests of their own too."""
    for sequences in (12, 100, 200, 256):
        assert runner.buckets(sequences)[-1] == sequences, f"no graph holds {sequences} sequences"
    for damage in test_engine.DAMAGE:
        test_engine.test_the_integrity_check_sees_damage(damage)


def check_config(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="rope_scaling"):
        Config.read(folder)


def run_all(where: str, folder: Path, scaled: Path) -> None:
    if where == "machine":
        run_machine()
    elif where == "network":
        check_network(folder)
    else:
        check_functions()
        check_config(scaled)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    keys = checkpoints.config("qwen3_moe", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("where", ["machine", "network", "function"])
def test_the_right_engine_passes(where: str, folder: Path, scaled: Path) -> None:
    if where == "machine":
        run_machine(300)  # fewer than a planted bug gets: it has to be seen, and test_engine runs the right one as well
    else:
        run_all(where, folder, scaled)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_bug_is_seen(name: str, folder: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name].plant(monkeypatch)
    with pytest.raises(BaseException) as seen:  # noqa: PT011 - whatever shape the damage takes
        run_all(FAULTS[name].where, folder, scaled)
    assert not isinstance(seen.value, KeyboardInterrupt | SystemExit | MemoryError)


def test_every_fault_has_an_address() -> None:
    assert len(FAULTS) >= 35
    assert all("github.com" in fault.source for fault in FAULTS.values())
