"""`moe-harness init` and `explain`: the files run and pass, the adapters fit, every name has its words."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_harness.harness.commands import explain, options
from moe_harness.harness.commands.init import CLASSES, TEMPLATES, templates
from moe_harness.harness.core.catalogue import all_faults
from moe_harness.harness.core.contracts import DECLARED_ROUNDINGS, RANK_STAGES, STAGES
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.registry import needed_part
from moe_harness.harness.process.pool import INTERPRETED_STEPS, Pool
from moe_harness.suites.command import run

SOME = {"router": "contract,special", "experts": "contract", "moe_block": "contract", "model": "contract"}
INTERPRETED = {"grouped_linear": "contract,layouts", "shared_expert_gate": "contract,layouts"}  # others: one check


def skip_without_interpreter(library):
    """Triton 3.6's interpreter fails with NumPy from 2.4 on, which the command says with status 3."""
    numbers = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if library == "triton" and numbers[0] <= (3, 6) and numbers[1] >= (2, 4):
        pytest.skip(f"the interpreter of Triton {version('triton')} does not go with NumPy {version('numpy')}")


@pytest.mark.parametrize(("stage", "library"), templates())
def test_a_template_passes_as_it_is(stage, library, tmp_path):
    skip_without_interpreter(library)
    made = run(tmp_path, "init", stage, "--library", library)
    assert made.returncode == 0 and (tmp_path / f"my_{stage}.py").exists(), made.stderr
    assert f"my_{stage}.py:" in made.stdout
    arguments = ["--dtype", "fp32", "--impl", f"my_{stage}.py:{CLASSES.get(stage, stage)}"]
    some = INTERPRETED.get(stage, "contract") if library == "triton" else SOME.get(stage, "contract,layouts")
    arguments += ["--ranks", "2"] if stage in RANK_STAGES else ["--check", some]
    done = run(tmp_path, "check", "--stage", stage, *arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


def draws_to_be_interpreted():
    """A case of draws that is judged of a Triton kernel where there is no GPU, too."""
    told = plan("sampler", Request(dtypes=("fp32",)))
    return next(p.id for p in told if p.case.data == "draws" and p.case.steps() <= INTERPRETED_STEPS)


@pytest.mark.parametrize("library", ["torch", "triton"])
def test_the_samplers_templates_draw_and_one_that_always_takes_the_likeliest_token_fails(
    library, tmp_path, monkeypatch
):
    """Form and support are right of a greedy sampler too: only counts tell it."""
    skip_without_interpreter(library)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run(tmp_path, "init", "sampler", "--library", library)
    kernel = (tmp_path / "my_sampler.py").read_text()
    (tmp_path / "greedy.py").write_text(kernel + "\n\ndef greedy(logits, **options):\n    return logits.argmax(1)\n")
    for spec, status in (("my_sampler.py:sampler", "passed"), ("greedy.py:greedy", "failed")):
        with Pool("sampler", str(tmp_path / spec), "cpu", 1, 60.0) as pool:
            assert pool.start().interpreted is (library == "triton")
            answer = pool.judge_one(draws_to_be_interpreted())
        assert answer.status == status, answer


def test_a_file_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "my_router.py").write_text("mine")
    again = run(tmp_path, "init", "router")
    assert again.returncode == 2 and "exists" in again.stderr
    assert (tmp_path / "my_router.py").read_text() == "mine"


KERNELS = """

def your_kernel_ehi(x, gate_up, down, *rest, **options):
    assert gate_up.shape[1] == x.shape[1] and down.shape[2] == x.shape[1]
    return experts(x, gate_up.mT, down.mT, *rest, **options)


def your_kernel_interleaved(x, gate_up, down, *rest, **options):
    return experts(x, torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1), down, *rest, **options)


experts_ehi.rounds = experts_interleaved.rounds = ()
"""


def test_the_adapters_in_the_comments_fit_kernels_of_other_layouts(tmp_path):
    text, _, adapters = (TEMPLATES / "experts_torch.py").read_text().partition("# ---- Weights in another layout?")
    lines = [line.removeprefix("#").removeprefix(" ") for line in adapters.splitlines()[1:]]
    (tmp_path / "kernel.py").write_text("\n".join([text, *lines, KERNELS]))
    specs = "kernel.py:experts_ehi,kernel.py:experts_interleaved"
    done = run(tmp_path, "check", "-s", "experts", "-i", specs, "--check", "contract,layouts", "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_template_for_a_library_says_which_there_are(tmp_path):
    done = run(tmp_path, "init", "reduction", "--library", "triton")
    assert done.returncode == 2 and "torch" in done.stderr


def _own_roundings(stage):
    contract = needed_part(stage, "contract")
    return {*getattr(contract, "ROUNDINGS", ()), *getattr(contract, "DECLARED_ONLY", ())}


def test_every_check_rounding_and_stage_is_explained():
    told = tomllib.loads(Path(explain.__file__).with_name("explanations.toml").read_text())
    checks = {check for stage in options.ALL_STAGES for check in explain._checks(stage)}
    own = {stage: _own_roundings(stage) for stage in STAGES}
    assert set(told["roundings"]) == set(DECLARED_ROUNDINGS).union(*own.values())
    for stage, names in own.items():  # of a stage's own set each is told for that stage, or means what it always does
        for name in names:
            assert stage in told["roundings"][name] or stage == "quantized_experts", (stage, name)
    assert {s for words in told["roundings"].values() for s in words} - {"question"} <= set(STAGES)
    assert not (unwritten := checks - set(told["checks"])) or all(dict(explain._unwritten(name)) for name in unwritten)
    assert set(told["checks"]) <= checks | {"routing"}, "words for a check that no stage has"
    assert all({"question", "equation", "bound", "source"} == set(entry) for entry in told["checks"].values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("numeric", ("sigma", "8.92", "moe-harness replay", "--impl")),
        ("gate_up_swapped", ("GSM8K", "experts", "def gate_up_swapped", "moe-harness faults --fault gate_up_swapped")),
        ("partial_sum", ("sum over slots", "in paged_attention", "rounds")),
        ("scaled_query", ("in paged_attention", "accepted only where it is declared")),
        ("experts", ("experts(hidden_states,", "moe-harness init experts")),
    ],
)
def test_a_name_is_explained(name, words, tmp_path):
    done = run(tmp_path, "explain", name)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and all(word in text for word in words), done.stdout + done.stderr


def test_an_unknown_name_has_near_ones(tmp_path):
    done = run(tmp_path, "explain", "gate_up_swaped")
    assert done.returncode == 2 and "gate_up_swapped" in done.stderr


def test_every_fault_has_its_lines():
    for fault in all_faults():
        labels = dict(explain._fault(fault))
        assert {"is", "consequence", "shows", "source", "code", "example"} <= set(labels)
        assert all(labels.values())
