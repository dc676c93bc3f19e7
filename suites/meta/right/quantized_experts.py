"""Right implementations of the stage `quantized_experts`, with the roundings and the scales that kernels have."""

import torch

from moe_harness.reference.quantized_experts import dequantised


def _rows(x, gate_up, down, biases, activation, store, entering):
    """One expert: what is stored in the dtype of the hidden states goes through `store`."""
    first = store(entering(x) @ gate_up.T)
    if biases[0] is not None:
        first = store(first + biases[0].float())
    gate, up = first.chunk(2, -1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), store(up.clamp(-7.0, 7.0) + 1)
        hidden = store(up * store(gate * (1.702 * gate).sigmoid()))
    elif activation == "silu":
        hidden = store(store(torch.nn.functional.silu(gate)) * up)
    else:
        hidden = store(store(torch.nn.functional.gelu(gate, approximate="tanh")) * up)
    out = store(entering(hidden) @ down.T)
    return out if biases[1] is None else store(out + biases[1].float())


def _experts(store, weight, entering, x, up, up_scale, down, down_scale, weights, ids, format, activation="silu",
             expert_map=None, gate_up_bias=None, down_bias=None):  # fmt: skip
    local = ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, -1, expert_map.long()[local.clamp(min=0)])
    total = torch.zeros(x.shape)
    for slot in range(ids.shape[1]):
        slots = torch.zeros(x.shape)
        for expert in local[:, slot].unique().tolist():
            if expert >= 0:
                rows = local[:, slot] == expert
                matrices = [
                    weight(dequantised(codes[expert], None if scale is None else scale[expert], format).float())
                    for codes, scale in ((up, up_scale), (down, down_scale))
                ]
                biases = [None if bias is None else bias[expert] for bias in (gate_up_bias, down_bias)]
                out = _rows(x[rows].float(), *matrices, biases, activation, store, entering)
                slots[rows] = store(out * weights[rows, slot, None].float())
        total = store(total + slots)
    return total.to(x.dtype)


def everything_stored(hidden_states, *call, **options):
    """Every permitted rounding, that of the weights among them."""

    def store(value):
        return value.to(hidden_states.dtype).float()

    return _experts(store, store, lambda rows: rows, hidden_states, *call, **options)


def weights_rounded(hidden_states, *call, **options):
    """Weights are dequantised to the dtype of the hidden states, sums are fp32."""
    return _experts(lambda v: v, lambda w: w.to(hidden_states.dtype).float(), lambda rows: rows, hidden_states, *call,
                    **options)  # fmt: skip


weights_rounded.rounds = ("weight",)


def _fp8(rows, width, power):
    columns = rows.shape[-1]
    groups = torch.nn.functional.pad(rows, (0, -columns % width)).unflatten(-1, (-1, width))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
    scale = scale.log2().ceil().exp2() if power else scale
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[..., :columns]


def fp8_groups_with_powers_of_two(hidden_states, *call, **options):
    """Activations by groups of 128, scales rounded up to powers of two."""
    return _experts(lambda v: v, lambda w: w, lambda rows: _fp8(rows, 128, True), hidden_states, *call, **options)


fp8_groups_with_powers_of_two.quantizes = "fp8_group128"
fp8_groups_with_powers_of_two.rounds = ()


def fp8_tokens_and_stores(hidden_states, *call, **options):
    """Activations by rows, and every store that a kernel of 16 bits has."""

    def store(value):
        return value.to(hidden_states.dtype).float()

    return _experts(store, lambda w: w, lambda rows: _fp8(rows, rows.shape[-1], False), hidden_states, *call, **options)


fp8_tokens_and_stores.quantizes = "fp8_token"
