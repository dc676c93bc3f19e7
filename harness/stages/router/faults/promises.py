"""Faults of the router in precision, and in what its contract promises."""

from typing import Any

from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.router.faults._steps import RIGHT, Routed, Steps, choose, run

# Precision ------------------------------------------------------------------------------------------------------


@fault(
    "precision", source="vllm-project/vllm/pull/14027", condition="16-bit logits",
    shows={"dtype": "bf16", "E": 64, "k": 8}, hidden=("dtype=fp32",),
)  # fmt: skip
def scores_in_logit_dtype(logits: Tensor, *, steps: Steps = RIGHT, **options: Any) -> Routed:
    """Scores are computed in the dtype of the logits: near scores become equal."""

    def narrow(logits: Tensor, scoring: str) -> Tensor:
        return steps.score(logits, scoring).to(logits.dtype).to(wide(logits))

    return run(logits, **options, steps=steps, score=narrow)


@fault(
    "precision", source="ViperEkura/AstrAI/pull/57", condition="flat scores over many experts",
    shows={"E": 256, "k": 8},
)  # fmt: skip
def selected_on_bf16_scores(logits: Tensor, **options: Any) -> Routed:
    """Probabilities are cast to bf16 before the selection only: another set is chosen."""
    return run(logits, **options, choose=lambda selection, top_k: choose(selection.bfloat16(), top_k))


@fault(
    "precision", source="sgl-project/sglang/pull/38719", condition="fp32 logits", shows={"E": 64, "k": 8},
    hidden=("dtype=bf16",),
)  # fmt: skip
def logits_cast_to_bf16(logits: Tensor, **options: Any) -> Routed:
    """fp32 logits are cast to the model's bf16 before anything is done with them."""
    return run(logits.bfloat16(), **options)


@fault(
    "precision", condition="fp32 logits", shows={"E": 64, "k": 8}, hidden=("dtype=bf16", "dtype=fp16"),
)  # fmt: skip
def logits_cast_to_fp16(logits: Tensor, **options: Any) -> Routed:
    """fp32 logits are computed or stored in fp16: near scores change places, and those beyond 65504 are infinite."""
    return run(logits.half(), **options)


@fault("precision", condition="weights returned in fp32")
def weights_rounded_to_bf16(logits: Tensor, **options: Any) -> Routed:
    """Weights are rounded to bf16, and nobody can tell from their dtype."""
    weights, ids = run(logits, **options)
    return weights.bfloat16().to(weights.dtype), ids


# Contract -------------------------------------------------------------------------------------------------------


@fault(
    "inputs", source="huggingface/transformers/pull/45315", condition="softmax", sign="inputs",
    hidden=("scoring=sigmoid",),
)  # fmt: skip
def logits_overwritten(logits: Tensor, *, scoring: str = "softmax", steps: Steps = RIGHT, **options: Any) -> Routed:
    """The softmax is written over the logits, which the caller still needs."""
    routed = run(logits, scoring=scoring, **options, steps=steps)
    if scoring == "softmax":
        logits.copy_(steps.score(logits, scoring))
    return routed


@fault(
    "inputs", condition="correction_bias given", shows={"bias": "small", "scoring": "sigmoid"}, sign="inputs",
    hidden=("bias=none",),
)  # fmt: skip
def bias_centred_in_place(logits: Tensor, **options: Any) -> Routed:
    """The bias is centred in place at every call."""
    routed = run(logits, **options)
    if options.get("correction_bias") is not None:
        options["correction_bias"].sub_(options["correction_bias"].mean() + 1)
    return routed


@fault("contract", sign="dtype")
def ids_before_weights(logits: Tensor, **options: Any) -> Routed:
    """Ids come before weights in the result."""
    return run(logits, **options)[::-1]


@fault("contract", sign="dtype")
def ids_as_floats(logits: Tensor, **options: Any) -> Routed:
    """Ids are returned as floating-point numbers."""
    weights, ids = run(logits, **options)
    return weights, ids.to(weights.dtype)


@fault("contract", condition="T = 0", shows={"T": 0}, sign="raises", hidden=("T=1",))
def raises_on_empty_logits(logits: Tensor, **options: Any) -> Routed:
    """The maximum of an empty batch is taken: an idle rank dies."""
    logits.max()
    return run(logits, **options)


@fault("contract", condition="k = 1", shows={"k": 1}, sign="shape", hidden=("k=2",))
def slot_dimension_squeezed(logits: Tensor, **options: Any) -> Routed:
    """A squeeze removes the slot dimension for top-1 models."""
    weights, ids = run(logits, **options)
    return (weights.squeeze(-1), ids.squeeze(-1)) if ids.shape[-1] == 1 else (weights, ids)
