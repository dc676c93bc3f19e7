"""The Triton experts under lm-eval: a tiny random model, saved and loaded by lm-eval itself, answers a local task.

lm-eval hands `experts_implementation` on to from_pretrained, so its answers must be the eager path's, computed by our
kernels.  Needs no hub: tokenizer, model and task are made here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.impls.triton import hf
from moe_harness.suites.triton import CUDA, DEVICE, runnable

transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'moe-harness[eval]')")
pytestmark = [pytest.mark.accuracy, *runnable]

WORDS = ["<pad>", "<eos>", "Question:", "Answer:", "####", "plus", *map(str, range(20))]
GENERATED = 12 if CUDA else 2
TASK = {
    "task": "sums", "dataset_path": "json", "test_split": "test", "doc_to_text": "Question: {{a}} plus {{b}} Answer:",
    "doc_to_target": "{{c}}",
}  # fmt: skip
KINDS = {
    "generate_until": {"generation_kwargs": {"until": ["Question:"], "max_gen_toks": GENERATED}},
    "multiple_choice": {"doc_to_choice": ["3", "5", "7"], "doc_to_target": 0},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers in fp32 with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(WORDS), hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every call of our experts."""
    seen: list[int] = []
    plain = hf.experts

    def counted(hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(len(hidden_states))
        return plain(hidden_states, *args, **options)

    monkeypatch.setattr(hf, "experts", counted)
    hf.register()
    return seen


def responses(checkpoint: Path, folder: Path, kind: str, implementation: str) -> list[Any]:
    """What the model answered, one entry per question."""
    data = folder / "sums.json"
    rows = [{"a": a, "b": b, "c": a + b} for a, b in ((1, 2), (4, 3), (9, 9))]
    data.write_text("\n".join(map(json.dumps, rows)))
    task = TASK | KINDS[kind] | {"output_type": kind, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    loading = {"pretrained": str(checkpoint), "dtype": "float32", "experts_implementation": implementation}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=loading, tasks=[task], device=DEVICE, batch_size=2, bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    samples = sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_eager_paths(checkpoint: Path, calls: list[int], tmp_path: Path, kind: str) -> None:
    ours = responses(checkpoint, tmp_path, kind, hf.NAME)
    assert len(calls) >= 2, "the Triton experts were never called"
    calls.clear()
    eager = responses(checkpoint, tmp_path, kind, "eager")
    assert not calls
    if kind == "generate_until":
        assert ours == eager and any(text for (text,) in ours)
    else:
        for mine, theirs in zip(ours, eager, strict=True):
            assert [likelihood for likelihood, _ in mine] == pytest.approx([value for value, _ in theirs])
