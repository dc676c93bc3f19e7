"""What a loaded model promises beyond the stage: draws that depend on the request alone, streams, counts, refusals."""

from typing import Any

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.scheduler import Refused
from moe_harness.impls.qwen3_moe.sequence import Request

SMALL: dict[str, Any] = {"page_size": 4, "max_sequences": 5, "max_tokens": 12, "pages": 40, "max_length": 60}
PROMPTS = [[(7 * n + p) % 128 for p in range(n)] for n in (1, 3, 4, 9, 14, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = checkpoints.make(tmp_path_factory.mktemp("model"), "qwen3_moe", dtype=torch.float32)
    return load_model(folder, device="cpu", dtype=torch.float64, **SMALL)


def test_a_draw_depends_on_its_request_alone(model: Model) -> None:
    """Alone, together, in another order: the same tokens; another seed: others."""
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "ignore_eos": True}
    together = model.generate(PROMPTS, seed=3, **options)
    assert model.generate(PROMPTS[::-1], seed=3, **options) == together[::-1]
    assert [model.generate([prompt], seed=3, **options)[0] for prompt in PROMPTS] == together
    assert model.generate(PROMPTS, seed=4, **options) != together
    assert model.generate(PROMPTS, seed=3, **options | {"temperature": 0.0}) != together


def test_cut_and_uncut_requests_run_side_by_side(model: Model) -> None:
    """top_k 1 and a tiny top_p leave the likeliest token; the rows beside them are not cut."""
    prompts = [tuple(prompt) for prompt in PROMPTS]
    greedy = model.engine.generate([Request(prompt, 8) for prompt in prompts])
    free = model.engine.generate([Request(prompt, 8, 1.0, seed=5) for prompt in prompts])
    cuts: list[dict[str, Any]] = [{"top_k": 1}, {}, {"top_p": 1e-6}, {}, {"top_k": 128, "top_p": 1e-6}, {"top_k": 128}]
    found = model.engine.generate([Request(p, 8, 1.0, seed=5, **c) for p, c in zip(prompts, cuts, strict=True)])
    assert found == [greedy[0], free[1], greedy[2], free[3], greedy[4], free[5]]
    assert greedy != free


def test_a_stop_token_is_the_last_one(model: Model) -> None:
    whole = model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    stop = whole[2][3]
    cut = model.generate(PROMPTS, max_new_tokens=12, stop_token_ids=[stop], ignore_eos=True)
    assert cut == [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in whole]
    assert any(len(short) < len(long) for short, long in zip(cut, whole, strict=True))
    model.engine.check()


def test_the_end_of_a_text_stops_unless_told_otherwise(model: Model) -> None:
    (end,) = model.config.stop_ids
    whole = model.generate(PROMPTS * 6, max_new_tokens=40, temperature=1.5, ignore_eos=True)
    assert any(end in tokens[:-1] for tokens in whole), "no text ends early: the test shows nothing"
    stopped = model.generate(PROMPTS * 6, max_new_tokens=40, temperature=1.5)
    assert stopped == [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]


def test_a_stream_gives_what_generate_gives(model: Model) -> None:
    wanted = model.generate(PROMPTS[3:4], max_new_tokens=7, ignore_eos=True)[0]
    assert list(model.stream(PROMPTS[3], max_new_tokens=7, ignore_eos=True)) == wanted
    assert not model.engine.sequences


def test_a_request_beside_a_call_goes_on(model: Model) -> None:
    number = model.engine.add(Request((1, 2, 3), 30))
    model.generate(PROMPTS[:2], max_new_tokens=2, ignore_eos=True)
    assert number in model.engine.sequences
    before = model.engine.sequences[number].new_tokens
    assert model.engine.abort(number) == before
    with pytest.raises(KeyError, match=f"no request {number} is alive"):
        model.engine.abort(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_new_tokens": [1, 2]}, "holds 2 numbers, wanted one for each of 6 prompts"),
     ({"max_new_tokens": 0}, "max_new_tokens is 0, wanted at least 1"),
     ({"max_new_tokens": 1000}, "request 0: .* wanted at most 60"),
     ({"max_new_tokens": 1, "temperature": -1.0}, "temperature is -1.0, wanted 0 or more"),
     ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature is nan")],
)  # fmt: skip
def test_wrong_calls_say_what_they_want(model: Model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **arguments)


def test_ids_outside_the_vocabulary_are_refused(model: Model) -> None:
    for prompts, message in (([[1], [128]], "prompt 1 holds 128, wanted ids in 0..127"), ([[-1]], "prompt 0 holds -1")):
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, max_new_tokens=1)
    with pytest.raises(Refused, match="empty"):
        model.generate([[1], []], max_new_tokens=1)
    assert model.generate([], max_new_tokens=1) == []


def test_logits_of_no_tokens_and_of_many(model: Model) -> None:
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 128)
    assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 128)
    assert model(torch.zeros(1, 70, dtype=torch.int64)).shape == (1, 70, 128)
