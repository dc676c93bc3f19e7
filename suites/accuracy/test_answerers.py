"""Who answers: the same whatever else is in the batch, nothing cut silently, and the implementation really in it.

The gate's own published faults are planted here, and each check is seen to fail on its fault.
"""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from moe_harness import fixtures
from moe_harness.fixtures.arithmetic import problems
from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.gate.answerers import Settings, find
from moe_harness.harness.gate.answerers.finding import resolve
from moe_harness.harness.gate.exchange import Request

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MODEL = Path(fixtures.__file__).parent / "checkpoints" / "arithmetic-moe"
SETTINGS = Settings(MODEL, dtype="fp32", batch_size=8)
KERNELS = """
import torch

def loop(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    out = torch.zeros_like(hidden_states)
    for t, j in torch.ones_like(topk_ids).nonzero().tolist():
        g, u = (gate_up_proj[topk_ids[t, j]] @ hidden_states[t]).chunk(2)
        out[t] += topk_weights[t, j] * (down_proj[topk_ids[t, j]] @ (torch.nn.functional.silu(g) * u))
    return out

def zero(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    return torch.zeros_like(hidden_states)

def hook(self, hidden_states, top_k_index, top_k_weights):
    return zero(hidden_states, None, None, None, None)

def block(hidden_states, weights, config):
    assert config["num_experts_per_tok"] == 2 and weights["experts.down_proj"].shape[0] == 8
    return torch.zeros_like(hidden_states)

def odd(x, y):
    return x

constant = 3
"""


def requests(count, shots=0):
    from moe_harness.fixtures.arithmetic.tokens import few_shot

    examples = list(itertools.islice(problems("train", 0), shots))
    return [
        Request("arithmetic", i, f"d{i}", f"p{i}", 0, few_shot(p, examples), f" {p.answer}", ("Question:",), 100)
        for i, p in enumerate(itertools.islice(problems("test", 0), count))
    ]


@pytest.fixture(scope="module")
def eager():
    return find("transformers:eager", SETTINGS)


@pytest.fixture(scope="module")
def likelihood(eager):
    """Of a gold answer after its prompt: what the reference gives in fp64, and how far from it fp32 may bring one.

    Errors at several positions may have one sign, so their standard deviations are added up.
    """
    from moe_harness.harness.core import bounds
    from moe_harness.harness.stages.model.folder import reference_of
    from moe_harness.harness.stages.model.noise import noise_bound

    model = reference_of(MODEL)

    @functools.cache
    def found(prompt, gold):
        whole, start = eager.tokens.gold(replace(requests(1)[0], prompt=prompt, gold=gold))
        ids = torch.tensor([whole])

        def each(ids, state):
            return model(ids, state).log_softmax(-1).gather(-1, ids.roll(-1, -1)[..., None])

        with torch.inference_mode():
            bound, answer = noise_bound(model, each, ids, torch.float32), slice(start - 1, -1)
        assert bound.routed[0, answer].all()
        return float(bound.value[0, answer].sum()), bounds.max_limit() * float(bound.sigma[0, answer].sum())

    return lambda request: found(request.prompt, request.gold)


@pytest.fixture
def kernels(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(KERNELS)
    return file


def texts(answers):
    return [answer.text for answer in answers]


def sentences(count, shots=0):
    """Requests for the first sentence alone, which ends after ten to twenty tokens."""
    return [replace(request, until=(".",)) for request in requests(count, shots)]


def independent_of_the_batch(answerer):
    """Alone, and beside questions that are longer, shorter and answered in fewer steps: half of them at once."""
    shortest = sorted(sentences(12), key=lambda request: len(request.prompt))[:4]
    at_once = [replace(request, max_new_tokens=2) for request in shortest]
    asked = [*at_once, *sentences(3), *sentences(1, shots=1)]
    return texts(answerer.answer(asked)) == [text for one in asked for text in texts(answerer.answer([one]))]


def test_it_answers_the_problems(eager):
    asked = requests(2, shots=1)
    for request, answer in zip(asked, eager.answer(asked), strict=True):
        assert answer.text == request.gold + "\n\n"
        assert (answer.key, answer.stop) == (request.key, "stop")
        assert answer.length == len(eager.tokens.encode(answer.text + "Question:"))


def test_an_answer_does_not_depend_on_the_batch(eager):
    assert independent_of_the_batch(eager)


def test_planted_stop_when_any_row_stops(eager, monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/873"""
    ended, begin = set(), eager._begin

    def another_batch(prompts):
        ended.clear()
        return begin(prompts)

    def any_ended(ids, request):
        if type(eager)._ended(eager, ids, request):
            ended.add(len(ids))
        return len(ids) in ended or len(ids) >= request.max_new_tokens

    monkeypatch.setattr(eager, "_begin", another_batch)
    monkeypatch.setattr(eager, "_ended", any_ended)
    assert not independent_of_the_batch(eager)


def test_planted_padding_on_the_right(eager, monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/1090: the next token is read behind the padding."""
    forward = eager.model.forward

    def right_padded(ids, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None and attention_mask.shape == ids.shape:  # the prompts
            kept = attention_mask.bool()
            ids = torch.stack([torch.cat((row[m], row[~m])) for row, m in zip(ids, kept, strict=True)])
        return forward(ids, **options)

    monkeypatch.setattr(eager.model, "forward", right_padded)
    assert not independent_of_the_batch(eager)


def refuses_what_does_not_fit(answerer):
    (one,) = requests(1)
    long = replace(one, prompt=one.prompt * 40)
    try:
        answerer.answer([long])
    except CannotJudge as error:
        return "fewer examples" in str(error)
    return False


def test_a_prompt_that_does_not_fit_is_refused(eager):
    assert refuses_what_does_not_fit(eager)


def test_planted_truncation_on_the_left(eager, monkeypatch):
    """github.com/EleutherAI/lm-evaluation-harness/issues/3115"""
    room = eager.tokens.longest - 100
    monkeypatch.setattr(eager.tokens, "prompt", lambda request: eager.tokens.encode(request.prompt)[-room:])
    monkeypatch.setattr(eager.tokens, "gold", lambda request: (eager.tokens.encode(request.prompt)[-room:], room - 1))
    assert not refuses_what_does_not_fit(eager)


def stops_at_every_string(answerer):
    """Strings that begin and end inside tokens."""
    (one,) = sentences(1)
    whole = answerer.answer([one])[0].text
    for stop in (whole[3:9], whole[10:13], whole[20:22]):
        (answer,) = answerer.answer([replace(one, until=(stop, "."))])
        if answer.text != whole[: whole.index(stop)] or answer.stop != "stop":
            return False
    return True


def test_stop_strings_count_across_tokens_and_are_cut(eager):
    assert stops_at_every_string(eager)


def test_planted_stop_strings_looked_for_token_by_token(eager, monkeypatch):
    def whole_token(ids, request):
        return len(ids) >= request.max_new_tokens or eager.tokens.decode(ids[-1:]) in request.until

    monkeypatch.setattr(eager, "_ended", whole_token)
    monkeypatch.setattr("moe_harness.harness.gate.answerers.tokens.cut", lambda text, until: None)
    assert not stops_at_every_string(eager)


def test_an_answer_that_was_cut_off_says_so(eager):
    (one,) = requests(1)
    (answer,) = eager.answer([replace(one, max_new_tokens=5)])
    assert (answer.length, answer.stop) == (5, "length")


def test_the_gold_answer_is_scored_token_by_token(eager, likelihood):
    (one,) = requests(1, shots=1)
    one = replace(one, gold=" This is no answer.")
    (gold,) = (answer.gold for answer in eager.answer([one]))
    value, reach = likelihood(one)
    assert abs(gold.loglikelihood - value) <= reach
    assert gold.tokens == tuple(eager.tokens.encode(one.gold))
    assert [row[0][0] for row in gold.likeliest] == list(gold.greedy)


@pytest.mark.parametrize("name", ["transformers:grouped_mm", "torch:loop", "{}:loop", "qwen3_moe"])
def test_right_implementations_give_the_same_answers(eager, kernels, likelihood, name):
    asked = sentences(2)
    answers, wanted = find(name.format(kernels), SETTINGS).answer(asked), eager.answer(asked)
    assert texts(answers) == texts(wanted)
    assert [a.length for a in answers] == [a.length for a in wanted]
    for request, a, b in zip(asked, answers, wanted, strict=True):
        value, reach = likelihood(request)
        assert abs(a.gold.loglikelihood - value) <= reach
        assert a.gold.greedy == b.gold.greedy


@pytest.mark.parametrize("name", ["zero", "hook", "block", "zero@2", "block@0"])
def test_what_is_put_in_computes(kernels, likelihood, name):
    """A layer left out costs little, since the others make up for it, and more than rounding ever does."""
    (asked,) = (replace(request, max_new_tokens=4) for request in requests(1))
    (wrong,) = find(f"{kernels}:{name}", SETTINGS).answer([asked])
    value, reach = likelihood(asked)
    assert wrong.gold.loglikelihood < value - reach


FUNCTIONS = """
def positional(x, gate_up, down, weights, ids): ...
def any_number(*operands): ...
def four(x, gate_up, down, weights): ...
def hook(self, hidden_states, top_k_index, top_k_weights): ...
def block(hidden_states, weights, config): ...
def load_model(model_dir, *, device, dtype, a, b): ...
"""


@pytest.mark.parametrize(
    ("name", "stage"),
    [("positional", "experts"), ("any_number", "experts"), ("hook", "hook"), ("block", "moe_block"),
     ("load_model", "model")],
)  # fmt: skip
def test_a_function_is_of_the_stage_that_its_arguments_tell(tmp_path, name, stage):
    """Whatever they are called, five are those of experts."""
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    told, function, layer = resolve(f"{file}:{name}")
    assert (told, function.__name__, layer) == (stage, name, None)
    assert resolve(f"{file}:{name}@3")[::2] == (stage, 3)
    with pytest.raises(UsageError, match=r"takes \(x, gate_up, down, weights\), which is no stage"):
        resolve(f"{file}:four")


def test_what_was_put_in_is_taken_out(eager):
    from moe_harness.harness.gate.answerers.plugging import plug

    ids = torch.tensor([eager.tokens.encode(requests(1)[0].prompt)])
    with torch.no_grad():
        before = eager.model(ids).logits
        for stage, layer in (("experts", None), ("experts", 1), ("moe_block", None), ("moe_block", 4)):
            take_out = plug(eager.model, stage, lambda x, *_, **__: torch.zeros_like(x), layer)
            assert not torch.equal(eager.model(ids).logits, before)
            take_out()
            assert torch.equal(eager.model(ids).logits, before)


@pytest.mark.parametrize(
    ("spec", "told"),
    [("transformers:eagre", "did you mean 'eager'"), ("qwen3_moo", "did you mean 'qwen3_moe'"),
     ("{}:nothing", "nothing"), ("{}:odd", "which is no stage"), ("{}:constant", "should be a function"),
     ("{}:zero@9", "the model has 6 sparse layers"), ("nowhere.py:f", "there is no file")],
)  # fmt: skip
def test_a_spec_that_names_nothing_is_refused(kernels, spec, told):
    with pytest.raises(UsageError, match=told):
        find(spec.format(kernels), SETTINGS)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(UsageError, match="--model"):
            find("transformers:eager", replace(SETTINGS, model=folder))


RANKED = """
import torch

def load_model(model_dir, *, device, dtype, group=None, expert_parallel=False, dispatcher="x"):
    return Model(group, expert_parallel, dispatcher)

class Model:
    def __init__(self, group, *told):
        self.group, self.told = group, told

    def __call__(self, input_ids):
        seen = torch.ones(1)
        torch.distributed.all_reduce(seen, group=self.group)
        logits = torch.zeros(*input_ids.shape, 640)
        logits[..., int(seen)] = 5.0
        return logits

    def generate(self, prompts, *, max_new_tokens, **options):
        ranks = [None] * self.group.size()
        torch.distributed.all_gather_object(ranks, (self.group.rank(), *self.told), group=self.group)
        if FAILS and self.group.rank() == 1:
            raise RuntimeError("rank one is lost")
        return [[100 + len(ranks)] for _ in prompts]
"""


@pytest.mark.parametrize("shared", [{"tp": 2}, {"ep": 2, "dispatcher": "naive"}])
def test_a_model_over_ranks_answers(tmp_path, shared):
    (tmp_path / "m.py").write_text(RANKED.replace("FAILS", "False"))
    ranks = find(f"{tmp_path / 'm.py'}:load_model", replace(SETTINGS, **shared))
    try:
        answers = ranks.answer([replace(request, max_new_tokens=1) for request in requests(2)])
        assert [answer.length for answer in answers] == [1, 1]
        assert answers[0].gold.greedy[0] == 2  # the sum over two ranks
        assert {name: ranks.identity()[name] for name in shared} == shared
    finally:
        ranks.close()


def test_experts_shared_twice_need_a_model_that_knows_how(tmp_path):
    (tmp_path / "m.py").write_text(RANKED)
    with pytest.raises(UsageError, match="expert_shards"):
        find(f"{tmp_path / 'm.py'}:load_model", replace(SETTINGS, tp=2, ep=2))


def test_what_a_model_refuses_is_a_wrong_call(tmp_path):
    """On one device and on ranks alike."""
    file = tmp_path / "m.py"
    file.write_text("def load_model(model_dir, *, device, dtype):\n    raise NotImplementedError('only on Tuesdays')\n")
    with pytest.raises(UsageError, match="only on Tuesdays"):
        find(f"{file}:load_model", SETTINGS)
    with pytest.raises(UsageError, match="wanted one of naive"):
        find("qwen3_moe", replace(SETTINGS, ep=2, dispatcher="nope"))


def test_a_rank_that_fails_is_told_and_no_wrong_answer(tmp_path):
    (tmp_path / "m.py").write_text(RANKED.replace("FAILS", "True"))
    ranks = find(f"{tmp_path / 'm.py'}:load_model", replace(SETTINGS, tp=2))
    with pytest.raises(CannotJudge, match=r"rank 1 of 2(.|\n)*rank one is lost"):
        ranks.answer(requests(1))
