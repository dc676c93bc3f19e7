"""Where vLLM keeps its kernels, as of 0.22.1."""

from typing import Any

from torch import Tensor

from moe_harness.impls.foreign import needed, no_masked_slot

INSTALL = "pip install vllm==0.22.1"
LAYERS = "vllm.model_executor.layers.fused_moe"
MOST_EXPERTS = 1023  # its alignment pads them to 1,024 threads


def of(module: str, attribute: str) -> Any:
    return needed(f"{LAYERS}.{module}", attribute, INSTALL)


def run(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    activation: str, expert_map: Tensor | None, config: object,
) -> Tensor:  # fmt: skip
    """`fused_experts`, which multiplies by the routing weight behind the second product.

    Raises:
        NotImplementedError: vllm is not here, or it has not what is asked for.
    """
    no_masked_slot("vllm", topk_ids)
    if activation == "swiglu_oai":
        raise NotImplementedError("vllm's swigluoai reads gate and up from rows in turn, not from halves")
    experts = len(gate_up_proj) if expert_map is None else len(expert_map)
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"vllm aligns at most {MOST_EXPERTS} experts, not {experts}")
    # It asserts that rows lie one behind the other, and takes it for granted of ids and weights.
    up, down = (w if w.stride(-1) == 1 else w.contiguous() for w in (gate_up_proj, down_proj))
    return of("fused_moe", "fused_experts")(
        hidden_states.contiguous(), up, down, topk_weights.contiguous(), topk_ids.int().contiguous(),
        inplace=False,
        activation=of("activation", "MoEActivation")(activation),
        global_num_experts=experts,
        expert_map=None if expert_map is None else expert_map.int(),
        quant_config=config,
    )  # fmt: skip
