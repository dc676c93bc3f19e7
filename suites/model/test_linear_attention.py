"""Qwen3-Next in the engine: what linear attention keeps of a sequence goes on from chunk to chunk, to no other one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.harness.ranks import judge
from moe_harness.impls.qwen3_moe import linear_attention, model, network
from moe_harness.impls.qwen3_moe.config import CheckpointError, Config
from moe_harness.impls.qwen3_moe.linear_attention import DeltaNet
from moe_harness.impls.qwen3_moe.weights import Layout
from moe_harness.impls.torch import delta_walk
from moe_harness.reference.model import Model as Reference

FAMILY = "qwen3_next"
SMALL: dict[str, Any] = {"pages": 7, "page_size": 4, "max_sequences": 3, "max_tokens": 8, "max_length": 30}
ROW = torch.randint(0, 128, (19,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [ROW[:3], ROW[:13], ROW, ROW[5:6], ROW[:16], ROW[:13]]
NEW = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp(FAMILY), FAMILY)


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    return greedy(checkpoints.config(FAMILY))


@torch.no_grad()
def greedy(keys: dict[str, Any]) -> list[list[int]]:
    """Greedy tokens of the reference, each prompt by itself."""
    reference, found = Reference(keys, checkpoints.tensors(keys)), []
    for prompt in PROMPTS:
        row = torch.tensor([prompt])
        for _ in range(NEW):
            row = torch.cat((row, reference(row)[:, -1:].argmax(-1)), dim=1)
        found.append(row[0, len(prompt) :].tolist())
    return found


def generated(folder: Path) -> tuple[list[list[int]], int]:
    """Over chunks, in rows that sequences follow each other in, with fewer pages than they need; preemptions too."""
    loaded = model.load_model(folder, device="cpu", dtype=torch.float64, **SMALL)
    tokens = loaded.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True)
    loaded.engine.check()
    return tokens, loaded.engine.scheduler.preemptions


def test_tokens_are_the_references(folder: Path, wanted: list[list[int]]) -> None:
    tokens, preemptions = generated(folder)
    assert tokens == wanted
    assert preemptions > 0


def never_forgets(patch: pytest.MonkeyPatch) -> None:
    """A new sequence goes on from what the last one in its row has left."""
    original = DeltaNet.__call__

    def call(self: DeltaNet, name: str, x: Tensor, flat: network.Flat, memory: Any) -> Tensor:
        return original(self, name, x, replace(flat, positions=flat.positions + 1), memory)

    patch.setattr(DeltaNet, "__call__", call)


def loses_the_inputs_between_chunks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeltaNet, "_keep", lambda *given: None)


def keeps_inputs_of_other_sequences(patch: pytest.MonkeyPatch) -> None:
    """Of a sequence shorter than the convolution, what stands before it in the step is kept too."""
    original = torch.where

    def where(condition: Tensor, one: Any, other: Any) -> Tensor:
        return original(condition | isinstance(other, int), one, other)

    patch.setattr(linear_attention.torch, "where", where)


def fades_behind_the_end(patch: pytest.MonkeyPatch) -> None:
    """The matrices of a sequence fade once more behind its last token."""
    original = delta_walk.delta_walk

    def walk(*given: Tensor) -> Tensor:
        *_, decay, _, matrices, rows, query_start, _ = given
        out = original(*given)
        matrices[rows] *= decay[query_start[1:].long() - 1, :, None, None]
        return out

    patch.setattr(delta_walk, "delta_walk", walk)


def finds_prefixes(patch: pytest.MonkeyPatch) -> None:
    """Pages of a prefix are taken over, for which there is no state."""
    pages: Callable[..., Any] = model.Pages
    patch.setattr(model, "Pages", lambda count, size, prefixes: pages(count, size, True))


def rows_in_the_order_of_the_step(patch: pytest.MonkeyPatch) -> None:
    """What a sequence knows lies where it stands in the step, which is another place in the next one."""
    original = DeltaNet.__call__

    def call(self: DeltaNet, name: str, x: Tensor, flat: network.Flat, memory: Any) -> Tensor:
        return original(self, name, x, replace(flat, rows=torch.arange(len(flat.context))), memory)

    patch.setattr(DeltaNet, "__call__", call)


def whole_heads_turned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Config, "turned", None)


def norms_of_their_weight_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network, "_of_excess", dict)


FAULTS = (
    never_forgets, loses_the_inputs_between_chunks, keeps_inputs_of_other_sequences, fades_behind_the_end,
    finds_prefixes, rows_in_the_order_of_the_step, whole_heads_turned, norms_of_their_weight_alone,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_changes_tokens(
    fault: Callable[[pytest.MonkeyPatch], None], folder: Path, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert generated(folder)[0] != wanted


def test_prefixes_are_found_where_all_layers_attend(tmp_path: Path) -> None:
    changes = {"full_attention_interval": 1}
    checkpoints.make(tmp_path, FAMILY, **changes)
    loaded = model.load_model(tmp_path, device="cpu", dtype=torch.float64, **SMALL)
    keys = checkpoints.config(FAMILY, **changes)
    assert loaded.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True) == greedy(keys)
    assert loaded.engine.scheduler.found_tokens > 0


@pytest.mark.parametrize("case", ["variant=logits,ep=1,B=2,L=7", "variant=tokens,B=3,L=9,new=3"])
def test_two_ranks_share_its_heads(case: str) -> None:
    verdict = judge.judge("qwen3_moe", f"model/over_ranks/{case},family={FAMILY},R=2")
    assert verdict.passed, verdict.findings or verdict.unsupported


def test_what_it_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linear_num_key_heads is 2, wanted a multiple of the 4 ranks"):
        Layout(Config.read(folder), 1, 4)
    wrong = checkpoints.make(tmp_path, FAMILY, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="layer_types"):
        Config.read(wrong)
