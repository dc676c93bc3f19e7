"""Adapters of other projects' kernels hand over what those kernels take.

On a stand-in of each library (`standins`) the judge finds every adapter right; without the library each says what is
not there and which line installs it.  What the libraries compute themselves is judged where they are installed.
"""

import sys
from typing import Any

import pytest

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.router.cases import RouterCase
from moe_harness.suites.adapters import standins

EXPERTS = ExpertsCase(T=9, dtype="bf16", weights="model")
BLOCKS = QuantizedCase(T=9, dtype="bf16", format="fp8_block", I=256, weights="model")
BIASED = QuantizedCase(T=9, dtype="bf16", format="plain", bias=True, activation="swiglu_oai")
PLAIN = {"T": 9, "E": 16, "k": 3}
DEEPSEEK: dict[str, Any] = {
    "T": 9, "E": 16, "k": 4, "scoring": "sigmoid", "bias": "small", "groups": "4x2", "scale": 2.5,
}  # fmt: skip
ADAPTERS: dict[str, list[Case]] = {
    "vllm": [EXPERTS, EXPERTS.but(map="alternate", activation="gelu_tanh")],
    "vllm:permuted": [EXPERTS],
    "vllm:aligned": [EXPERTS, EXPERTS.but(map="alternate", activation="gelu_tanh")],
    "vllm:fused_topk": [RouterCase(**PLAIN, renorm=False), RouterCase(**PLAIN, scoring="sigmoid")],
    "vllm:fused_topk_bias": [RouterCase(**PLAIN, scoring="sigmoid", bias="small", scale=2.5)],
    "vllm:grouped_topk": [RouterCase(**DEEPSEEK), RouterCase(**PLAIN, groups="4x2", renorm=False)],
    "vllm:fp8": [BLOCKS, BLOCKS.but(map="alternate")],
    "vllm:fp8_token": [BLOCKS.but(format="fp8_channel")],
    "vllm:int8": [BLOCKS.but(format="int8_channel")],
    "vllm:int4": [BLOCKS.but(format="int4_group")],
    "sglang": [EXPERTS, EXPERTS.but(masked="some", map="alternate")],
    "sglang:aligned": [EXPERTS.but(T=40), EXPERTS.but(masked="some"), EXPERTS.but(map="alternate")],
    "sglang:fp8": [BLOCKS, BLOCKS.but(masked="some", map="alternate")],
    "sglang:plain": [BIASED, BIASED.but(activation="silu", masked="some")],
    "sglang:topk_softmax": [RouterCase(**PLAIN, renorm=False), RouterCase(**PLAIN)],
    "sglang:topk_sigmoid": [RouterCase(**PLAIN, scoring="sigmoid", bias="small")],
    "sglang:moe_fused_gate": [RouterCase(**DEEPSEEK)],
    "flashinfer": [EXPERTS],
    "flashinfer:fp8": [BLOCKS],
    "flashinfer:plain": [BIASED, BIASED.but(activation="silu")],
    "flashinfer:fused_topk_deepseek": [RouterCase(**DEEPSEEK)],
    "deepgemm": [GroupedLinearCase(S=150, E=4, dtype="bf16")],
    "deepgemm:fp8": [BLOCKS.but(T=40, E=3)],
    "torchtitan": [
        RouterCase(**PLAIN, renorm=False, scale=2.5),
        RouterCase(**PLAIN, scoring="sigmoid", bias="small"),
        RouterCase(**DEEPSEEK, dtype="bf16"),
    ],
    "liger": [RmsNormCase(lead="5"), RmsNormCase(lead="5", residual=True)],
    "megatron": [RouterCase(**PLAIN, renorm=False), RouterCase(**PLAIN), RouterCase(**DEEPSEEK)],
}
GIVEN = [pytest.param(spec, case, id=f"{spec}-{n}") for spec, cases in ADAPTERS.items() for n, case in enumerate(cases)]
PACKAGES = ("vllm", "sglang", "sgl_kernel", "flashinfer", "deep_gemm", "torchtitan", "megatron", "liger_kernel")
REFUSED = [
    ("vllm", EXPERTS.but(masked="some"), "indexes with every id"),
    ("vllm:fused_topk", RouterCase(**DEEPSEEK), "takes no correction bias"),
    ("vllm:fp8", BLOCKS.but(H=200), "whole groups of 128"),
    ("sglang:moe_fused_gate", RouterCase(**DEEPSEEK | {"E": 20}), "a power of two"),
    ("flashinfer", EXPERTS.but(activation="gelu_tanh"), "activation but silu"),
    ("deepgemm", GroupedLinearCase(bias=True), "takes no bias"),
    ("flashinfer:fused_topk_deepseek", RouterCase(**DEEPSEEK | {"E": 160}), "group of more than 32"),
    ("vllm:permuted", EXPERTS.but(H=68), "whole 16 bytes"),
    ("sglang", EXPERTS.but(activation="gelu_tanh"), "activation but silu"),
    ("sglang:fp8", BLOCKS.but(activation="swiglu_oai"), "clamped activation beside scales of blocks"),
    ("flashinfer:fp8", BLOCKS.but(activation="swiglu_oai"), "clamped activation beside scales of blocks"),
    ("flashinfer:plain", BIASED.but(activation="gelu_tanh"), "activation but silu"),
    ("flashinfer", EXPERTS.but(map="alternate"), "takes no expert map"),
    ("torchtitan", RouterCase(**DEEPSEEK | {"bias": "none"}), "groups without a bias"),
    ("megatron", RouterCase(T=3, E=8, k=1, scoring="sigmoid"), "renormalised sigmoid of one expert"),
    ("megatron", RouterCase(**DEEPSEEK | {"k": 2}), "sum of other experts"),
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library, as a stand-in."""
    for package in PACKAGES:
        hide(monkeypatch, package)
    for name in ("vllm", "sglang", "flashinfer", "deepgemm", "torchtitan", "megatron", "liger"):
        getattr(standins, name)(monkeypatch)


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def called(spec: str, case: Case) -> tuple[Trial, Any, Any]:
    """The trial, the call of the case on CPU tensors, and what the adapter gives."""
    trial = Trial(load(case.stage, spec), "cpu")
    call = trial.build(case)
    return trial, call, trial.subject.function(*call.args.values(), **call.keywords)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("spec", "case"), GIVEN)
def test_what_is_handed_over_means_what_the_library_takes_it_for(spec: str, case: Case) -> None:
    trial, call, result = called(spec, case)
    assert not trial.judge(call, result).findings


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("spec", "case", "told"), REFUSED)
def test_what_the_library_has_no_argument_for_is_refused(spec: str, case: Case, told: str) -> None:
    with pytest.raises(NotImplementedError, match=told):
        called(spec, case)


@pytest.mark.parametrize(("spec", "case"), [(spec, cases[0]) for spec, cases in ADAPTERS.items()])
def test_without_the_library_the_line_that_installs_it_is_told(
    spec: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        hide(monkeypatch, package)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotImplementedError, match="which is not here .*: pip install "):
        called(spec, case)
