"""Right implementations of the stage `quantized_experts`: the roundings, orders, promotions and scales of kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.reference.quantized_experts import code_values, dequantised

FP8 = torch.float8_e4m3fn


def _same(value: Tensor) -> Tensor:
    return value


def _matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows @ matrix.T


def _silu(gate: Tensor) -> Tensor:
    return gate * gate.sigmoid()


class _Kernel(NamedTuple):
    """How one implementation goes about it; each part takes and gives fp32."""

    store: Callable[[Tensor], Tensor] = _same  # between the steps
    weight: Callable[[Tensor], Tensor] = _same
    entering: Callable[[Tensor], Tensor] = _same  # rows, before a product
    product: Callable[[Tensor, Tensor], Tensor] = _matmul  # [rows, K] and [N, K]
    silu: Callable[[Tensor], Tensor] = _silu
    weighted_hidden: bool = False  # the routing weight goes into the second product
    bias_first: bool = False
    slots: Callable[[range], Any] = iter


def _hidden(k: _Kernel, first: Tensor, activation: str) -> Tensor:
    gate, up = first.chunk(2, -1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), k.store(up.clamp(-7.0, 7.0) + 1)
        return k.store(up * k.store(gate * (1.702 * gate).sigmoid()))
    return k.store(k.store(k.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up)


def _plus(k: _Kernel, product: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return k.store(product)
    return k.store(bias.float() + product) if k.bias_first else k.store(k.store(product) + bias.float())


def _experts(k: _Kernel, x: Tensor, up: Tensor, up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None,
             weights: Tensor, ids: Tensor, format: str, activation: str = "silu", expert_map: Tensor | None = None,
             gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:  # fmt: skip
    local = ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, -1, expert_map.long()[local.clamp(min=0)])
    outputs = torch.zeros(*ids.shape, x.shape[1])
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        token, slot = (local == expert).nonzero(as_tuple=True)
        gate_up, second = (
            k.weight(dequantised(codes[expert], None if scale is None else scale[expert], format).float())
            for codes, scale in ((up, up_scale), (down, down_scale))
        )
        bias, down_by = (None if b is None else b[expert] for b in (gate_up_bias, down_bias))
        hidden = _hidden(k, _plus(k, k.product(k.entering(x[token].float()), gate_up), bias), activation)
        weight = weights[token, slot, None].float()
        if k.weighted_hidden:
            out = k.product(k.entering(k.store(hidden * weight)), second)
            outputs[token, slot] = out if down_by is None else out + weight * down_by.float()
        else:
            outputs[token, slot] = k.store(_plus(k, k.product(k.entering(hidden), second), down_by) * weight)
    total = torch.zeros(x.shape)
    for slot in k.slots(range(ids.shape[1])):
        total = k.store(total + outputs[:, slot])
    return total.to(x.dtype)


def _in(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Storing in the dtype of the hidden states."""
    return lambda value: value.to(x.dtype).float()


def everything_stored(hidden_states, *call, **options):
    """Every permitted rounding, that of the weights among them."""
    store = _in(hidden_states)
    return _experts(_Kernel(store=store, weight=store), hidden_states, *call, **options)


def weights_rounded(hidden_states, *call, **options):
    """Weights are dequantised to the dtype of the hidden states, sums are fp32."""
    return _experts(_Kernel(weight=_in(hidden_states)), hidden_states, *call, **options)


weights_rounded.rounds = ("weight",)


def gate_up_stored(hidden_states, *call, **options):
    """The first product is stored, and stored again behind its bias; all else is fp32."""
    store = _in(hidden_states)
    kernel = _Kernel(product=lambda rows, matrix: store(rows @ matrix.T), store=store)
    return _experts(kernel, hidden_states, *call, **options)


def bias_in_the_accumulator(hidden_states, *call, **options):
    """Sums begin with the bias."""
    return _experts(_Kernel(bias_first=True), hidden_states, *call, **options)


bias_in_the_accumulator.rounds = ()


def weight_in_the_second_product(hidden_states, *call, **options):
    """Hidden values are multiplied by the routing weight, and so is the bias of the output."""
    kernel = _Kernel(store=_in(hidden_states), weighted_hidden=True)
    return _experts(kernel, hidden_states, *call, **options)


def last_slot_first(hidden_states, *call, **options):
    """The sum over slots runs backwards, in the dtype of the hidden states."""
    kernel = _Kernel(store=_in(hidden_states), slots=reversed)
    return _experts(kernel, hidden_states, *call, **options)


def silu_from_tanh(hidden_states, *call, **options):
    """silu(g) = g / 2 * (1 + tanh(g / 2)), one instruction of the special function unit."""
    kernel = _Kernel(silu=lambda gate: gate * (0.5 + 0.5 * (0.5 * gate).tanh()))
    return _experts(kernel, hidden_states, *call, **options)


silu_from_tanh.rounds = ()


def _by_runs(rows: Tensor, matrix: Tensor, width: int, order: Callable[[range], Any] = iter) -> Tensor:
    """Sums over runs of columns, added up one after the other."""
    total = rows.new_zeros(len(rows), len(matrix))
    for start in order(range(0, rows.shape[1], width)):
        total = total + rows[:, start : start + width] @ matrix[:, start : start + width].T
    return total


def promoted_every_128_columns(hidden_states, *call, **options):
    """Sums of 128 columns, added up in fp32."""
    return _experts(_Kernel(product=partial(_by_runs, width=128)), hidden_states, *call, **options)


promoted_every_128_columns.rounds = ()


def promoted_every_16_columns_backwards(hidden_states, *call, **options):
    """Sums of 16 columns, the last ones first."""
    kernel = _Kernel(product=partial(_by_runs, width=16, order=reversed))
    return _experts(kernel, hidden_states, *call, **options)


promoted_every_16_columns_backwards.rounds = ()


def even_columns_then_odd_ones(hidden_states, *call, **options):
    """The low codes of every byte, then the high ones."""
    kernel = _Kernel(
        product=lambda x, w: x[:, ::2] @ w[:, ::2].T + x[:, 1::2] @ w[:, 1::2].T, weight=_in(hidden_states)
    )
    return _experts(kernel, hidden_states, *call, **options)


even_columns_then_odd_ones.rounds = ("weight",)


def columns_split_among_four(hidden_states, *call, **options):
    """Four programs share the columns, each of its sums is fp32."""

    def product(rows: Tensor, matrix: Tensor) -> Tensor:
        return sum(rows[:, i::4] @ matrix[:, i::4].T for i in range(4))

    return _experts(_Kernel(product=product, store=_in(hidden_states)), hidden_states, *call, **options)


def _groups(rows: Tensor, width: int | None) -> Tensor:
    """[rows, runs, columns of a run], zeros at the end of the last one."""
    across = width or max(1, rows.shape[-1])
    return F.pad(rows, (0, -rows.shape[-1] % across)).unflatten(-1, (-1, across))


def _fp8(rows: Tensor, width: int | None, power: bool = False, reciprocal: bool = False) -> Tensor:
    """rows as codes of e4m3 times a scale for each run of `width` columns, or for each row."""
    groups = _groups(rows, width)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = largest / 448.0
    scale = scale.log2().ceil().exp2() if power else scale
    safe = torch.where(scale == 0, 1.0, scale)
    codes = groups * (448.0 / torch.where(largest == 0, 1.0, largest)) if reciprocal else groups / safe
    return (codes.clamp(-448.0, 448.0).to(FP8).float() * scale).flatten(-2)[..., : rows.shape[-1]]


def _int8(rows: Tensor, power: bool = False) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / 127.0
    scale = scale.log2().ceil().exp2() if power else scale
    return (rows / torch.where(scale == 0, 1.0, scale)).round() * scale


def fp8_groups(hidden_states, *call, **options):
    """Activations by groups of 128, each sum of 128 columns promoted."""
    kernel = _Kernel(entering=partial(_fp8, width=128), product=partial(_by_runs, width=128))
    return _experts(kernel, hidden_states, *call, **options)


fp8_groups.quantizes = "fp8_group128"
fp8_groups.rounds = ()


def fp8_groups_with_powers_of_two(hidden_states, *call, **options):
    """Activations by groups of 128, scales rounded up to powers of two."""
    return _experts(_Kernel(entering=partial(_fp8, width=128, power=True)), hidden_states, *call, **options)


fp8_groups_with_powers_of_two.quantizes = "fp8_group128"
fp8_groups_with_powers_of_two.rounds = ()


def fp8_groups_by_the_reciprocal(hidden_states, *call, **options):
    """x * (448 / largest) instead of a division by the scale: another code at a tie, half an ulp of the scale."""
    kernel = _Kernel(entering=partial(_fp8, width=128, reciprocal=True), store=_in(hidden_states))
    return _experts(kernel, hidden_states, *call, **options)


fp8_groups_by_the_reciprocal.quantizes = "fp8_group128"


def _short_sums(rows: Tensor, matrix: Tensor) -> Tensor:
    """Sums of 32 columns cut to 14 bits, as fp8 tensor cores add them up, promoted every 128."""
    total = rows.new_zeros(len(rows), len(matrix))
    for start in range(0, rows.shape[1], 128):
        inner = torch.zeros_like(total)
        for k in range(start, min(start + 128, rows.shape[1]), 32):
            inner = inner + rows[:, k : k + 32] @ matrix[:, k : k + 32].T
            inner = (inner.view(torch.int32) & -1024).view(torch.float32)
        total = total + inner
    return total


def fp8_groups_with_14_bits_between_promotions(hidden_states, *call, **options):
    """Hopper's accumulator: 14 bits between promotions every 128 columns."""
    kernel = _Kernel(entering=partial(_fp8, width=128), product=_short_sums)
    return _experts(kernel, hidden_states, *call, **options)


fp8_groups_with_14_bits_between_promotions.quantizes = "fp8_group128"


def fp8_tokens_and_stores(hidden_states, *call, **options):
    """Activations by rows, and every store that a kernel of 16 bits has."""
    kernel = _Kernel(entering=partial(_fp8, width=None), store=_in(hidden_states))
    return _experts(kernel, hidden_states, *call, **options)


fp8_tokens_and_stores.quantizes = "fp8_token"


def fp8_tokens_with_powers_of_two(hidden_states, *call, **options):
    """Activations by rows, scales rounded up to powers of two."""
    return _experts(_Kernel(entering=partial(_fp8, width=None, power=True)), hidden_states, *call, **options)


fp8_tokens_with_powers_of_two.quantizes = "fp8_token"
fp8_tokens_with_powers_of_two.rounds = ()


def int8_tokens(hidden_states, *call, **options):
    """Activations by rows in int8."""
    return _experts(_Kernel(entering=_int8), hidden_states, *call, **options)


int8_tokens.quantizes = "int8_token"
int8_tokens.rounds = ()


def int8_tokens_with_powers_of_two(hidden_states, *call, **options):
    """Activations by rows in int8, scales rounded up to powers of two, every store."""
    kernel = _Kernel(entering=partial(_int8, power=True), store=_in(hidden_states))
    return _experts(kernel, hidden_states, *call, **options)


int8_tokens_with_powers_of_two.quantizes = "int8_token"


def in_fp64_until_the_end(hidden_states, *call, **options):
    """All sums in fp64: nothing is rounded but the result."""
    kernel = _Kernel(product=lambda rows, matrix: (rows.double() @ matrix.double().T).float())
    return _experts(kernel, hidden_states, *call, **options)


in_fp64_until_the_end.rounds = ()


def _local(ids, expert_map):
    local = ids.long()
    return local if expert_map is None else torch.where(local < 0, -1, expert_map.long()[local.clamp(min=0)])


def _of(expert, *stacks):
    """What belongs to one expert."""
    return [None if stack is None else stack[expert] for stack in stacks]


def persistent_over_padded_tiles(x, up, up_scale, down, down_scale, weights, ids, *, format, activation="silu",
                                 expert_map=None, gate_up_bias=None, down_bias=None):  # fmt: skip
    """Two programs take every other one of the sorted tiles of eight rows, a partial one padded by rows of zeros."""
    local, k = _local(ids, expert_map), _Kernel()
    rows = torch.cat([x.float(), torch.zeros(1, x.shape[1])])
    shares = torch.cat([weights.float().flatten(), torch.zeros(1)])
    out, tiles = torch.zeros_like(rows), []
    for e in local[local >= 0].unique().tolist():
        slots = (local.flatten() == e).nonzero()[:, 0]
        tiles += [(e, tile) for tile in F.pad(slots, (0, -len(slots) % 8), value=ids.numel()).split(8)]
    for program in (1, 0):
        for e, slots in tiles[program::2]:
            first, first_scale, second, second_scale = _of(e, up, up_scale, down, down_scale)
            first_bias, second_bias = _of(e, gate_up_bias, down_bias)
            token = slots // ids.shape[1]
            product = rows[token] @ dequantised(first, first_scale, format).float().T
            hidden = _hidden(k, _plus(k, product, first_bias), activation)
            product = hidden @ dequantised(second, second_scale, format).float().T
            out.index_add_(0, token, _plus(k, product, second_bias) * shares[slots, None])
    return out[:-1].to(x.dtype)


persistent_over_padded_tiles.rounds = ()


def split_along_hidden_values(x, up, up_scale, down, down_scale, weights, ids, *, format, activation="silu",
                              expert_map=None, gate_up_bias=None, down_bias=None):  # fmt: skip
    """Programs of 32 hidden values, stored, add their parts of the output in fp32; the first one adds the bias."""
    local, k = _local(ids, expert_map), _Kernel()
    out = torch.zeros(x.shape)
    for e in local[local >= 0].unique().tolist():
        token, slot = (local == e).nonzero(as_tuple=True)
        first, second = (dequantised(*_of(e, *pair), format).float() for pair in ((up, up_scale), (down, down_scale)))
        weight, inner = weights[token, slot, None].float(), second.shape[1]
        for at in range(0, inner, 32):
            own = torch.arange(at, min(at + 32, inner))
            both = torch.cat([own, own + inner])
            bias = None if gate_up_bias is None else gate_up_bias[e, both]
            product = _plus(k, x[token].float() @ first[both].T, bias)
            part = _hidden(k, product, activation).to(x.dtype).float() @ second[:, own].T
            out.index_add_(0, token, weight * _plus(k, part, None if at or down_bias is None else down_bias[e]))
    return out.to(x.dtype)


split_along_hidden_values.rounds = ("activation",)


def _behind(rows, codes, scale, format):
    """A product of codes as they are stored, four bits with their zero point: scales and that come behind the sums."""
    zero = 8.0 if format == "int4_group" else 0.0
    numbers = code_values(codes, format).float() + zero
    if scale is None:
        return rows @ numbers.T
    if scale.dim() == 1:
        return rows @ numbers.T * scale
    total, width = torch.zeros(len(rows), len(numbers)), 32 if format == "mxfp4" else 128
    scale = (scale.double() - 127).exp2() if format == "mxfp4" else scale
    scale = scale.repeat_interleave(128, 0)[: len(numbers)] if format == "fp8_block" else scale
    for group, at in enumerate(range(0, rows.shape[1], width)):
        part = rows[:, at : at + width]
        sums = part @ numbers[:, at : at + width].T - zero * part.sum(-1, keepdim=True)
        total = total + sums * scale[:, group].float()
    return total


def scales_behind_the_product(x, up, up_scale, down, down_scale, weights, ids, *, format, activation="silu",
                              expert_map=None, gate_up_bias=None, down_bias=None):  # fmt: skip
    """Codes are multiplied as they are stored; behind the sum of a group 8 sum x is taken off, and the scale comes."""
    local, k = _local(ids, expert_map), _Kernel()
    out = torch.zeros(x.shape)
    for e in local[local >= 0].unique().tolist():
        token, slot = (local == e).nonzero(as_tuple=True)
        first_bias, second_bias = _of(e, gate_up_bias, down_bias)
        hidden = _hidden(k, _plus(k, _behind(x[token].float(), *_of(e, up, up_scale), format), first_bias), activation)
        output = _plus(k, _behind(hidden, *_of(e, down, down_scale), format), second_bias)
        out.index_add_(0, token, output * weights[token, slot, None].float())
    return out.to(x.dtype)


scales_behind_the_product.rounds = ()


def fp8_of_weighted_hidden_values(hidden_states, *call, **options):
    """The routing weight is folded into hidden values before these become codes, at scales of powers of two."""
    kernel = _Kernel(entering=partial(_fp8, width=None, power=True), weighted_hidden=True, store=_in(hidden_states))
    return _experts(kernel, hidden_states, *call, **options)


fp8_of_weighted_hidden_values.quantizes = "fp8_token"
