"""Stand-ins for libraries that are not installed: functions of their names that take what the libraries take.

Each holds its library's own conventions (names, dtypes, layouts, the order of gate and up, what is filled in place) and
computes what the library would, from the plain implementations.  An adapter that swaps two arguments gives a result
that the judge refuses, one that hands over another dtype or shape is told at once.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.suites.adapters.conventions import FLOAT, FP8, INT, aligned, holds, plain, put, routed
from moe_harness.suites.adapters.vllm_standins import vllm as vllm

SGLANG = "sglang.srt.layers.moe.fused_moe_triton"


def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """sglang 0.5.3 and sgl-kernel 0.3.14; its routers fill what they are given."""

    def fill(weights: Tensor, ids: Tensor, chosen: tuple[Tensor, Tensor]) -> None:
        holds(weights, FLOAT, 2)
        holds(ids, INT, 2)
        weights.copy_(chosen[0])
        ids.copy_(chosen[1])

    def topk_softmax(topk_weights: Tensor, topk_ids: Tensor, gating_output: Tensor, renormalize: bool = False) -> None:
        fill(topk_weights, topk_ids, routed(gating_output, topk_ids.shape[1], "softmax", renormalize))

    def topk_sigmoid(
        topk_weights: Tensor, topk_ids: Tensor, gating_output: Tensor, renormalize: bool = False,
        correction_bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        if correction_bias is not None:
            holds(correction_bias, FLOAT, 1)
        top_k = topk_ids.shape[1]
        fill(
            topk_weights,
            topk_ids,
            routed(gating_output, top_k, "sigmoid", renormalize, correction_bias=correction_bias),
        )

    def moe_fused_gate(
        input_tensor: Tensor, bias: Tensor, num_expert_group: int, topk_group: int, topk: int,
        num_fused_shared_experts: int = 0, routed_scaling_factor: float = 0,
        apply_routed_scaling_factor_on_output: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        holds(bias, input_tensor.dtype, 1)
        assert num_fused_shared_experts == 0
        scale = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
        return routed(input_tensor, topk, "sigmoid", True, correction_bias=bias, num_expert_group=num_expert_group,
                      topk_group=topk_group, routed_scaling_factor=scale)  # fmt: skip

    def fused_experts_impl(
        hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, b1: Tensor | None = None,
        b2: Tensor | None = None, inplace: bool = False, activation: str = "silu", use_fp8_w8a8: bool = False,
        w1_scale: Tensor | None = None, w2_scale: Tensor | None = None, block_shape: list[int] | None = None,
        gemm1_alpha: float | None = None, gemm1_limit: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows of w1 are gate, then up; gate and up in turn where there is an alpha.  Slots of -1 add nothing."""
        holds(topk_ids, INT, 2)
        holds(topk_weights, FLOAT, 2)
        assert w1.is_contiguous() and w2.is_contiguous() and not inplace and activation == "silu"
        assert bool(((topk_ids >= -1) & (topk_ids < len(w1))).all())
        assert use_fp8_w8a8 == (block_shape == [128, 128]) and (gemm1_alpha is None) == (gemm1_limit is None)
        if gemm1_alpha is not None:
            assert (gemm1_alpha, gemm1_limit, use_fp8_w8a8) == (1.702, 7.0, False)
            w1, b1 = (t if t is None else torch.cat([t[:, ::2], t[:, 1::2]], 1) for t in (w1, b1))
        stage = plain("quantized_experts", "torch:fp8_group128" if use_fp8_w8a8 else "torch:dequantized")
        return stage(
            hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids, gate_up_bias=b1, down_bias=b2,
            format="fp8_block" if use_fp8_w8a8 else "plain",
            activation="silu" if gemm1_alpha is None else "swiglu_oai",
        )  # fmt: skip

    def moe_align_block_size(topk_ids: Tensor, block: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        return aligned(topk_ids, block, experts, first=-1)

    put(monkeypatch, "sgl_kernel", topk_softmax=topk_softmax, topk_sigmoid=topk_sigmoid, moe_fused_gate=moe_fused_gate)
    put(monkeypatch, f"{SGLANG}.fused_moe", fused_experts_impl=fused_experts_impl)
    put(monkeypatch, f"{SGLANG}.moe_align_block_size", moe_align_block_size=moe_align_block_size)


def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """flashinfer 0.7.4, flashinfer.fused_moe: up rows before gate rows, and so their scales."""

    def gate_first(rows: Tensor) -> Tensor:
        assert rows.is_contiguous()
        half = rows.shape[1] // 2
        return rows.roll(half, 1) if rows.dtype != FP8 else rows.view(torch.uint8).roll(half, 1).view(FP8)

    def cutlass_fused_moe(
        input: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor, fc1_expert_weights: Tensor,
        fc2_expert_weights: Tensor, output_dtype: torch.dtype, quant_scales: list[Tensor],
        fc1_expert_biases: Tensor | None = None, fc2_expert_biases: Tensor | None = None,
        swiglu_alpha: Tensor | None = None, swiglu_beta: Tensor | None = None, swiglu_limit: Tensor | None = None,
        use_deepseek_fp8_block_scale: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        holds(token_selected_experts, INT, 2)
        holds(token_final_scales, FLOAT, 2)
        assert output_dtype == input.dtype
        clamped = [t for t in (swiglu_alpha, swiglu_beta, swiglu_limit) if t is not None]
        for tensor, value in zip(clamped, (1.702, 1.0, 7.0), strict=bool(clamped)):
            holds(tensor, FLOAT, 1)
            assert torch.equal(tensor, torch.full((len(fc2_expert_weights),), value))
        for bias in (fc1_expert_biases, fc2_expert_biases):
            assert bias is None or bias.dtype == input.dtype
        assert len(quant_scales) == 2 * use_deepseek_fp8_block_scale and not (clamped and quant_scales)
        first, second = quant_scales or (None, None)
        stage = plain("quantized_experts", "torch:fp8_group128" if quant_scales else "torch:dequantized")
        return [stage(
            input, gate_first(fc1_expert_weights), first if first is None else gate_first(first), fc2_expert_weights,
            second, token_final_scales, token_selected_experts, format="fp8_block" if quant_scales else "plain",
            activation="swiglu_oai" if clamped else "silu", down_bias=fc2_expert_biases,
            gate_up_bias=fc1_expert_biases if fc1_expert_biases is None else gate_first(fc1_expert_biases),
        )]  # fmt: skip

    def fused_topk_deepseek(
        scores: Tensor, bias: Tensor, n_group: int, topk_group: int, topk: int, routed_scaling_factor: float,
        topk_values: Tensor, topk_indices: Tensor, launch_with_pdl: bool = True,
    ) -> None:  # fmt: skip
        holds(topk_values, FLOAT, 2)
        holds(topk_indices, INT, 2)
        holds(bias, scores.dtype, 1)
        weights, ids = routed(scores, topk, "sigmoid", True, correction_bias=bias, num_expert_group=n_group,
                              topk_group=topk_group, routed_scaling_factor=routed_scaling_factor)  # fmt: skip
        topk_values.copy_(weights)
        topk_indices.copy_(ids)

    put(monkeypatch, "flashinfer.fused_moe", cutlass_fused_moe=cutlass_fused_moe,
        fused_topk_deepseek=fused_topk_deepseek)  # fmt: skip


def deepgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """deep_gemm 2.8: tiles of 128 rows of one expert, or of padding; what is padding is not written."""

    def bf16(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, *, use_psum_layout: bool = True) -> None:
        """As its binding tells: (..., use_psum_layout: bool = True)."""
        assert not use_psum_layout
        product(a, b, d, grouped_layout)

    def product(a: Tensor, b: Tensor, d: Tensor, m_indices: Tensor) -> None:
        holds(m_indices, INT, 1)
        assert len(a) == len(m_indices) == len(d) and len(a) % 128 == 0
        for tile in m_indices.split(128):
            assert len(set(tile[tile >= 0].tolist())) == 1
        d.fill_(float("nan"))
        live = m_indices >= 0
        d[live] = torch.einsum("mk,mnk->mn", a[live].float(), b.float()[m_indices[live].long()]).to(d.dtype)

    def fp8(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, m_indices: Tensor, **options: Any) -> None:
        assert options == {"disable_ue8m0_cast": True}
        (rows, by_group), (codes, by_block) = a, b
        holds(rows, FP8, 2)
        holds(codes, FP8, 3)
        spread = by_block.repeat_interleave(128, 1)[:, : codes.shape[1]].repeat_interleave(128, 2)
        product(rows.float() * by_group.repeat_interleave(128, 1), codes.float() * spread, d, m_indices)

    put(monkeypatch, "deep_gemm", m_grouped_bf16_gemm_nt_contiguous=bf16, m_grouped_fp8_gemm_nt_contiguous=fp8,
        get_m_alignment_for_contiguous_layout=lambda: 128)  # fmt: skip


def torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan 0.3.0, torchtitan.models.common.moe."""

    class TokenChoiceTopKRouter(torch.nn.Module):
        @dataclass(kw_only=True)
        class Config:
            num_experts: int
            gate: Any
            num_expert_groups: int | None = None
            num_limited_groups: int | None = None
            top_k: int = 1
            score_func: str = "sigmoid"
            route_norm: bool = False
            route_scale: float = 1.0

        def __init__(self, config: Config):
            super().__init__()
            self.gate, self.config = config.gate.build(), config

        def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
            c = self.config
            scores = self.gate(x)
            assert scores.dtype == FLOAT and scores.shape[1] == c.num_experts
            assert c.num_expert_groups is None or expert_bias is not None
            found = plain("router", "torch:loop")(
                scores, top_k=c.top_k, scoring=c.score_func, renormalize=c.route_norm, correction_bias=expert_bias,
                num_expert_group=c.num_expert_groups, topk_group=c.num_limited_groups,
                routed_scaling_factor=c.route_scale,
            )  # fmt: skip
            return *found, None

    put(monkeypatch, "torchtitan.models.common.moe", TokenChoiceTopKRouter=TokenChoiceTopKRouter)


def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron.core: probabilities and a map over all experts."""

    def topk_routing_with_score_function(
        logits: Tensor, topk: int, use_pre_softmax: bool = False, num_groups: int | None = None,
        group_topk: int | None = None, scaling_factor: float | None = None, score_function: str = "softmax",
        expert_bias: Tensor | None = None, fused: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        renormalize = score_function == "sigmoid" or not use_pre_softmax
        weights, ids = routed(
            logits, topk, score_function, renormalize, num_expert_group=num_groups, topk_group=group_topk,
            routed_scaling_factor=scaling_factor or 1.0, correction_bias=expert_bias,
        )  # fmt: skip
        zeros = torch.zeros(logits.shape)
        return zeros.scatter(1, ids.long(), weights), zeros.scatter(1, ids.long(), 1.0).bool()

    put(monkeypatch, "megatron.core.transformer.moe.moe_utils",
        topk_routing_with_score_function=topk_routing_with_score_function)  # fmt: skip


def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel 0.8.5, its normalisations: what comes behind eps is offset, casting mode and in_place."""

    class Alone:
        @staticmethod
        def apply(x: Tensor, w: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
            assert (offset, casting_mode, in_place) == (0.0, "llama", False)
            return plain("rms_norm", "torch")(x, w, eps=eps)

    class Added:
        @staticmethod
        def apply(x: Tensor, r: Tensor, w: Tensor, eps: float, *rest: Any) -> tuple[Tensor, Tensor]:
            assert rest == (0.0, "llama", False)
            return plain("rms_norm", "torch")(x, w, eps=eps, residual=r)

    put(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=Alone)
    put(monkeypatch, "liger_kernel.ops.fused_add_rms_norm", LigerFusedAddRMSNormFunction=Added)
