"""The stand-in for vLLM."""

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.suites.adapters.conventions import FLOAT, INT, aligned, holds, plain, put, routed


class MoEActivation(Enum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"


VLLM = "vllm.model_executor.layers.fused_moe"


def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm 0.22.1."""
    _vllm_experts(monkeypatch)
    _vllm_routers(monkeypatch)
    _vllm_alignment(monkeypatch)


def _vllm_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_experts(
        hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, inplace: bool = False,
        activation: MoEActivation = MoEActivation.SILU, apply_router_weight_on_input: bool = False,
        global_num_experts: int = -1, expert_map: Tensor | None = None, quant_config: Any = None,
    ) -> Tensor:  # fmt: skip
        holds(topk_ids, INT, 2)
        assert not inplace and not apply_router_weight_on_input and isinstance(activation, MoEActivation)
        assert global_num_experts == (len(w1) if expert_map is None else len(expert_map))
        options = {"activation": activation.value, "expert_map": expert_map}
        if expert_map is not None:
            holds(expert_map, INT, 1)
        if quant_config is None:
            return plain("experts", "torch:loop")(hidden_states, w1, w2, topk_weights, topk_ids, **options)
        c = quant_config
        spec, format = KINDS[c.kind, c.by]
        scales = [s[..., 0] if c.by == "row" else s for s in (c.w1_scale, c.w2_scale)]
        stage = plain("quantized_experts", spec)
        return stage(hidden_states, w1, scales[0], w2, scales[1], topk_weights, topk_ids, format=format, **options)

    def fp8(
        w1_scale: Tensor, w2_scale: Tensor, a1_scale: Tensor | None = None, a2_scale: Tensor | None = None,
        per_act_token_quant: bool = False, per_out_ch_quant: bool = False, block_shape: list[int] | None = None,
    ) -> Any:  # fmt: skip
        assert per_act_token_quant == per_out_ch_quant == (block_shape is None) and block_shape in (None, [128, 128])
        return SimpleNamespace(kind="fp8", by="block" if block_shape else "row", w1_scale=w1_scale, w2_scale=w2_scale)

    def int8(w1_scale: Tensor, w2_scale: Tensor, a1_scale: None, a2_scale: None, per_act_token_quant: bool) -> Any:
        assert per_act_token_quant
        return SimpleNamespace(kind="int8", by="row", w1_scale=w1_scale, w2_scale=w2_scale)

    def int4(w1_scale: Tensor, w2_scale: Tensor, w1_zp: None, w2_zp: None, block_shape: list[int]) -> Any:
        assert block_shape == [0, 128]
        return SimpleNamespace(kind="int4", by="group", w1_scale=w1_scale, w2_scale=w2_scale)

    put(monkeypatch, f"{VLLM}.fused_moe", fused_experts=fused_experts)
    put(monkeypatch, f"{VLLM}.activation", MoEActivation=MoEActivation)
    put(monkeypatch, f"{VLLM}.config", fp8_w8a8_moe_quant_config=fp8, int8_w8a8_moe_quant_config=int8,
        int4_w4a16_moe_quant_config=int4)  # fmt: skip


def _vllm_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_topk(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, indices_type: Any = None,
        scoring_func: str = "softmax",
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weights, ids = routed(gating_output, topk, scoring_func, renormalize)
        return weights, ids, ids.clone()

    def fused_topk_bias(
        hidden_states: Tensor, gating_output: Tensor, scoring_func: str, e_score_correction_bias: Tensor, topk: int,
        renormalize: bool, indices_type: Any = None, input_tokens: Any = None, hash_indices_table: Any = None,
        routed_scaling_factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        more = {"correction_bias": e_score_correction_bias, "routed_scaling_factor": routed_scaling_factor}
        return routed(gating_output, topk, scoring_func, renormalize, **more)

    def grouped_topk(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, num_expert_group: int = 0,
        topk_group: int = 0, scoring_func: str = "softmax", routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return routed(
            gating_output, topk, scoring_func, renormalize, num_expert_group=num_expert_group, topk_group=topk_group,
            routed_scaling_factor=routed_scaling_factor, correction_bias=e_score_correction_bias,
        )  # fmt: skip

    put(monkeypatch, f"{VLLM}.router.fused_topk_router", fused_topk=fused_topk)
    put(monkeypatch, f"{VLLM}.router.fused_topk_bias_router", fused_topk_bias=fused_topk_bias)
    put(monkeypatch, f"{VLLM}.router.grouped_topk_router", grouped_topk=grouped_topk)


def _vllm_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_permute(hidden_states: Tensor, a1q_scale: None, topk_ids: Tensor, n_expert: int) -> tuple[Any, ...]:
        holds(topk_ids, INT, 2)
        order = topk_ids.flatten().argsort(stable=True)
        first = torch.bincount(topk_ids.flatten(), minlength=n_expert).cumsum(0)
        first = torch.cat([first.new_zeros(1), first])
        return hidden_states[order // topk_ids.shape[1]], None, first, order.argsort(), order

    def moe_unpermute(
        out: Tensor, permuted_hidden_states: Tensor, topk_weights: Tensor, inv_permuted_idx: Tensor, first: Tensor
    ) -> None:
        holds(topk_weights, FLOAT, 2)
        rows = permuted_hidden_states[inv_permuted_idx].view(*topk_weights.shape, -1)
        out.copy_((rows.float() * topk_weights[..., None]).sum(1))

    def moe_align_block_size(
        topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        slots, experts, total = aligned(topk_ids, block_size, num_experts)
        return slots, experts if expert_map is None else expert_map[experts], total

    put(monkeypatch, f"{VLLM}.moe_align_block_size", moe_align_block_size=moe_align_block_size)
    put(monkeypatch, f"{VLLM}.moe_permute_unpermute", moe_permute=moe_permute, moe_unpermute=moe_unpermute)


KINDS = {
    ("fp8", "block"): ("torch:fp8_group128", "fp8_block"), ("fp8", "row"): ("torch:fp8_token", "fp8_channel"),
    ("int8", "row"): ("torch:int8_token", "int8_channel"), ("int4", "group"): ("torch:dequantized", "int4_group"),
}  # fmt: skip
