"""The arithmetic problems and the checkpoint that answers them."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest

from moe_harness import fixtures
from moe_harness.fixtures.arithmetic import problems, write_dataset
from moe_harness.fixtures.arithmetic.stories import STORIES

FOLDER = Path(fixtures.__file__).parent / "checkpoints"
CHECKPOINT = FOLDER / "arithmetic-moe"
STEP = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def first(split, count, seed=0):
    return list(itertools.islice(problems(split, seed), count))


def test_a_seed_gives_the_same_problems_and_another_seed_others():
    assert first("test", 50) == first("test", 50)
    assert first("test", 50) != first("test", 50, seed=1)


def test_no_question_is_in_both_splits_nor_twice():
    asked, shown = ([p.question for p in first(split, 2000)] for split in ("test", "train"))
    assert len(set(asked)) == len(asked)
    assert not set(asked) & set(shown)


def test_every_step_is_right_and_the_last_one_is_the_answer():
    for problem in first("test", 1000):
        *steps, last = problem.answer.splitlines()
        for step in steps:
            told = STEP.search(step)
            assert told is not None, step
            a, sign, b, *again, value, shown = told.groups()
            assert [a, sign, b] == again
            assert shown == value
            assert eval(f"{a}{sign}{b}") == int(value)
        assert last == f"#### {value}"


def test_every_story_is_told():
    openings = {story.question.split("{")[-1].split("}")[-1] for story in STORIES}
    asked = [problem.question for problem in first("test", 1319)]
    told = {ending for ending in openings if any(question.endswith(ending) for question in asked)}
    assert told == openings


def test_numbers_of_the_question_are_needed():
    """An answer that only repeats a number of the question is right rarely, so the accuracy measures something."""
    asked = first("test", 1000)
    repeated = sum(p.answer.split()[-1] in re.findall(r"\d+", p.question) for p in asked)
    assert repeated < 60


def test_the_dataset_has_the_published_form(tmp_path):
    write_dataset(tmp_path, test=5, train=3)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"question", "answer"}] * 5
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 3


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, test"):
        next(problems("dev", 0))


def test_the_checkpoint_is_the_documented_one():
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 16 << 20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (FOLDER / "README.md").read_text()


def trained():
    """The network as it was trained, with the weights that were released."""
    import torch
    from safetensors.torch import load_file

    from moe_harness.fixtures.arithmetic.network import CONFIG, Network, released

    network, experts = Network(CONFIG), CONFIG["num_experts"]
    stored = {name: value.float() for name, value in load_file(CHECKPOINT / "model.safetensors").items()}
    assert set(released(network, experts)) == set(stored)
    state = network.state_dict()
    for name in state:
        parts = name.split(".")
        if parts[-2] in ("gate_proj", "up_proj", "down_proj"):
            each = [stored[f"model.layers.{parts[1]}.mlp.experts.{e}.{parts[-2]}.weight"] for e in range(experts)]
            state[name] = torch.cat(each, dim=1 if parts[-2] == "down_proj" else 0)
        else:
            state[name] = stored[f"model.{name}"]
    network.load_state_dict(state)
    return network


def largest_error(network):
    """Of the logits of random tokens in fp32, in standard deviations of what rounding alone may do."""
    import torch

    from moe_harness.harness.stages.model.folder import reference_of
    from moe_harness.harness.stages.model.noise import logit_bound

    ids = torch.randint(0, 640, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bound = logit_bound(reference_of(CHECKPOINT), ids, torch.float32)
        assert bound.routed.double().mean() > 0.9  # nearly all of it is judged
        return float(bound.z(network(ids)[0])[bound.routed].abs().max())


def test_training_and_the_reference_compute_the_same_logits():
    """The network that was trained is the one that is released: same function of the same weights."""
    torch = pytest.importorskip("torch")
    from moe_harness.harness.core import bounds

    network = trained()
    assert largest_error(network) < bounds.max_limit()
    with torch.no_grad():
        next(network.parameters())[7] += 1e-3  # planted: one row of the embedding
    assert largest_error(network) > bounds.max_limit()


def test_every_expert_of_every_layer_is_used():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from moe_harness.fixtures.arithmetic.tokens import few_shot

    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    shots, slots = first("train", 3), []
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args: slots.append(args[1].flatten()))
    with torch.no_grad():
        for problem in first("test", 12):
            model(torch.tensor([tokenizer(f"{few_shot(problem, shots)} {problem.answer}")["input_ids"]]))
    for layer in range(6):
        counts = torch.bincount(torch.cat(slots[layer::6]), minlength=8)
        assert counts.min() / counts.sum() > 0.02, f"layer {layer}: {counts.tolist()}"
