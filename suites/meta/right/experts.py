"""Right fused experts as strangers write them: only torch, and every legitimate place to round and order to sum."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}


def to_local(topk_ids, expert_map):
    """Local ids as int64; -1 for a slot that contributes nothing."""
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    return torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])


def _product(rows, weight):
    return rows @ weight.mT


def _by_expert(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None, mm=_product, glu=None,
              weighted=None, kind=torch.float32):  # fmt: skip
    """Expert by expert, all in `kind`, one rounding at the end.

    `mm` is the product, `glu` what stands for act(g) * u; with `weighted`, which stores them, the hidden values are
    multiplied by the routing weight, and not the output.
    """
    act = ACTIVATIONS[activation]
    glu = glu or (lambda g, u: act(g) * u)
    ids = to_local(topk_ids, expert_map)
    out = torch.zeros(x.shape, dtype=kind, device=x.device)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = mm(x[t].to(kind), w13[e].to(kind)).chunk(2, dim=-1)
        hidden, weight = glu(g, u), topk_weights[t, j, None].to(kind)
        if weighted is None:
            out.index_add_(0, t, mm(hidden, w2[e].to(kind)) * weight)
        else:
            out.index_add_(0, t, mm(weighted(hidden * weight), w2[e].to(kind)))
    return out.to(x.dtype)


def loop_fp32(x, *call, **options):
    """Everything in fp32, one rounding at the end, expert by expert."""
    return _by_expert(x, *call, **options)


loop_fp32.rounds = ()


def round_every_stage(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Products, activation, expert output, weight, weighted output and each partial sum in the model's dtype."""
    ids = to_local(topk_ids, expert_map)
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        h = (x[t].float() @ w13[e].float().mT).to(x.dtype)
        g, u = h.chunk(2, dim=-1)
        a = ACTIVATIONS[activation](g) * u
        y = (a.float() @ w2[e].float().mT).to(x.dtype)
        y = y * topk_weights[t, j, None].to(x.dtype)
        for row in range(t.numel()):  # duplicates of a token must add one after the other
            out[t[row]] += y[row]
    return out


def running_sum_over_slots(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """fp32 inside each expert, the sum over slots kept in the model's dtype."""
    ids = to_local(topk_ids, expert_map)
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for slot in range(ids.shape[1]):
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e in ids[:, slot].unique().tolist():
            if e < 0:
                continue
            t = torch.where(ids[:, slot] == e)[0]
            g, u = (x[t].float() @ w13[e].float().mT).chunk(2, dim=-1)
            y[t] = ((ACTIVATIONS[activation](g) * u) @ w2[e].float().mT) * topk_weights[t, slot, None].float()
        out = (out.float() + y).to(x.dtype)
    return out


running_sum_over_slots.rounds = ("partial_sum",)


def slots_in_reverse(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Weighted outputs of the slots stored in the model's dtype and summed from the last to the first in fp32."""
    ids = to_local(topk_ids, expert_map)
    buffer = torch.zeros(*ids.shape, w2.shape[1], dtype=x.dtype, device=x.device)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = (x[t].float() @ w13[e].float().mT).chunk(2, dim=-1)
        y = (ACTIVATIONS[activation](g) * u) @ w2[e].float().mT
        buffer[t, j] = (y * topk_weights[t, j, None].float()).to(x.dtype)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in reversed(range(ids.shape[1])):
        out += buffer[:, slot].float()
    return out.to(x.dtype)


slots_in_reverse.rounds = ("weighted",)


def weight_before_down(x, *call, **options):
    """The routing weight multiplies the activation, which is linear from there on."""
    return _by_expert(x, *call, **options, weighted=lambda hidden: hidden)


def weight_in_model_dtype(x, w13, w2, topk_weights, *ids, **options):
    """Routing weights are cast to the model's dtype first, as most of the model code does."""
    return _by_expert(x, w13, w2, topk_weights.to(x.dtype), *ids, **options)


def sorted_and_grouped(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Rows sorted by expert, one product per run, put back with the inverse permutation."""
    ids = to_local(topk_ids, expert_map)
    T, k = ids.shape
    flat = torch.where(ids < 0, w13.shape[0], ids).flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=w13.shape[0] + 1)[: w13.shape[0]].tolist()
    rows = x[order.div(max(k, 1), rounding_mode="floor")].float()
    y = torch.zeros(T * k, w2.shape[1], dtype=torch.float32, device=x.device)
    start = 0
    for e, n in enumerate(counts):
        if n:
            g, u = (rows[start : start + n] @ w13[e].float().mT).chunk(2, dim=-1)
            y[start : start + n] = (ACTIVATIONS[activation](g) * u).to(x.dtype).float() @ w2[e].float().mT
            start += n
    back = torch.empty_like(order)
    back[order] = torch.arange(T * k, device=x.device)
    live = torch.where(ids < 0, torch.zeros_like(topk_weights), topk_weights).float()
    return (y[back].view(T, k, w2.shape[1]) * live[..., None]).sum(1).to(x.dtype)


sorted_and_grouped.rounds = ("activation",)


def gather_and_bmm(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Weights gathered per slot and multiplied in one batch; masked slots are selected away."""
    ids = to_local(topk_ids, expert_map)
    T, k = ids.shape
    chosen, live = ids.clamp(min=0).flatten(), (ids >= 0)
    if w13.shape[0] == 0 or T == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    rows = x.float().repeat_interleave(k, dim=0).unsqueeze(-1)
    h = torch.bmm(w13[chosen].float(), rows).squeeze(-1)
    g, u = h.chunk(2, dim=-1)
    y = torch.bmm(w2[chosen].float(), (ACTIVATIONS[activation](g) * u).unsqueeze(-1)).view(T, k, -1)
    y = torch.where(live[..., None], y * topk_weights.float()[..., None], torch.zeros_like(y))
    return y.sum(dim=1).to(x.dtype)


gather_and_bmm.graph_capturable = True


def split_k(x, *call, **options):
    """K in chunks of 48 with a partial last one; the partial results are added in fp32."""

    def mm(a, b):
        parts = [a[:, s : s + 48] @ b[:, s : s + 48].mT for s in range(0, a.shape[1], 48)]
        return torch.stack(parts).sum(0) if parts else a.new_zeros(a.shape[0], b.shape[0])

    return _by_expert(x, *call, **options, mm=mm)


def k_backwards(x, *call, **options):
    """K summed from its end."""
    return _by_expert(x, *call, **options, mm=lambda a, b: a.flip(1) @ b.flip(1).mT)


def sequential_chunks(x, *call, **options):
    """K in chunks of 16 added to a running fp32 accumulator, as tensor cores do."""

    def mm(a, b):
        acc = a.new_zeros(a.shape[0], b.shape[0])
        for s in range(0, a.shape[1], 16):
            acc = acc + a[:, s : s + 16] @ b[:, s : s + 16].mT
        return acc

    return _by_expert(x, *call, **options, mm=mm)


def double_inside(x, *call, **options):
    """fp64 throughout, rounded once."""
    return _by_expert(x, *call, **options, kind=torch.float64)


double_inside.rounds = ()


def silu_by_tanh(x, *call, activation="silu", **options):
    """sigmoid(g) as 0.5 * (1 + tanh(g / 2)); only SiLU is supported."""
    if activation != "silu":
        raise NotImplementedError(f"activation {activation!r}; only 'silu' is supported")
    return _by_expert(x, *call, **options, glu=lambda g, u: g * (0.5 * (1 + torch.tanh(g * 0.5))) * u)


def silu_by_exp(x, *call, activation="silu", **options):
    """g / (1 + exp(-g)): exp overflows to infinity for very negative g, and g / inf is the right 0."""
    if activation != "silu":
        raise ValueError("only silu")
    return _by_expert(x, *call, **options, glu=_exp_glu)


def _exp_glu(g, u):
    return torch.where(torch.isinf(g), F.silu(g), g / (1 + torch.exp(-g))) * u


def int32_inside(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Ids converted to int32, as kernels want them; tokens in a Python loop, so rows cannot influence each other."""
    ids = to_local(topk_ids, expert_map).to(torch.int32)
    act = ACTIVATIONS[activation]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for t, row in enumerate(ids.tolist()):
        acc = torch.zeros(w2.shape[1], dtype=torch.float32, device=x.device)
        for j, e in enumerate(row):
            if e >= 0:
                h = w13[e].float() @ x[t].float()
                half = h.shape[0] // 2
                acc = acc + topk_weights[t, j].float() * (w2[e].float() @ (act(h[:half]) * h[half:]))
        out[t] = acc.to(x.dtype)
    return out


int32_inside.deterministic = True
int32_inside.batch_invariant = True


def only_bf16(x, *call, **options):
    """A kernel compiled for bf16 that says so."""
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(f"dtype {x.dtype}; only bfloat16 is supported")
    return sorted_and_grouped(x, *call, **options)


only_bf16.dtypes = ("bf16",)


def only_contiguous(x, *call, **options):
    """A kernel without strides in its signature, which refuses what it cannot read."""
    for name, t in zip(("x", "w13", "w2", "topk_weights", "topk_ids"), (x, *call), strict=True):
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, but has strides {t.stride()}")
    return gather_and_bmm(x, *call, **options)


def round_gate_up(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Two GEMM kernels with a workspace in the model's dtype between them, the activation in fp32 on the fly."""

    def glu_of(h):
        g, u = h.to(x.dtype).float().chunk(2, dim=-1)
        return ACTIVATIONS[activation](g) * u

    ids = to_local(topk_ids, expert_map)
    y = torch.zeros(*ids.shape, w2.shape[1], dtype=torch.float32, device=x.device)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        y[t, j] = (glu_of(x[t].float() @ w13[e].float().mT) @ w2[e].float().mT).to(x.dtype).float()
    live = topk_weights.float().masked_fill(ids < 0, 0.0)
    return torch.einsum("tk,tkh->th", live, y).to(x.dtype)


round_gate_up.rounds = ("gate_up", "expert_output")


def compensated_sum(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    """Kahan's sum over the slots of a token."""
    ids = to_local(topk_ids, expert_map)
    total, lost = torch.zeros(x.shape), torch.zeros(x.shape)
    for slot in range(ids.shape[1]):
        for e in ids[:, slot].unique().tolist():
            t = torch.where(ids[:, slot] == e)[0]
            if e < 0:
                continue
            g, u = (x[t].float() @ w13[e].float().mT).chunk(2, dim=-1)
            y = (ACTIVATIONS[activation](g) * u) @ w2[e].float().mT * topk_weights[t, slot, None].float() - lost[t]
            grown = total[t] + y
            lost[t], total[t] = (grown - total[t]) - y, grown
    return total.to(x.dtype)


def activation_twice_rounded(x, *call, activation="silu", **options):
    """act(g), and its product with u, in the model's dtype; all else in fp32."""
    act = ACTIVATIONS[activation]
    return _by_expert(x, *call, **options, glu=lambda g, u: (act(g).to(x.dtype).float() * u).to(x.dtype).float())


activation_twice_rounded.rounds = ("activation",)
