r"""The next token of each row: argmax, or a draw from the softmax cut to top_k, then to top_p.

The draw has Gumbel's form: the kept token with the largest (logit - max) / temperature + g wins, where g belongs to
(seed, position, token) alone (`_random.py`).  So no probability is ever written, a row is read once, and what it draws
depends on nothing else in the batch.  Two launches without cuts, three with them; none waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._common import FLOATS, interpreting, on, programs_at_once
from moe_harness.impls.triton._cut import BITS, find_cut, ordered
from moe_harness.impls.triton._random import gumbel

__all__ = ["sampler"]  # what is registered

LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _draw(
    logits, temperature, seeds, positions, edges, lasts, part_top, part_best, part_choice, V, part, block,
    b_stride, v_stride, t_stride, seed_stride, p_stride,
    CUT: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Best of the tokens of one part of row program_id(0): its score, relative to the largest logit of the part.

    `block` is the number of blocks of four tokens that other shards of the vocabulary hold before this one.

    Every lane keeps its own best, relative to its own largest logit, so that the loop has no reduction in it.  The
    largest starts at a finite number: a logit of -inf then has the score -inf by itself, and no difference is NaN.
    """
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    degrees = tl.load(temperature + b * t_stride).to(tl.float32)
    warm = degrees > 0
    inverse = tl.minimum(tl.div_rn(1.0, tl.where(warm, degrees, 1.0)), 3e38)
    seed = tl.load(seeds + b * seed_stride).to(tl.int64)
    position = tl.load(positions + b * p_stride).to(tl.int64)
    if CUT:
        edge = tl.load(edges + b).to(tl.uint32)
        last = tl.load(lasts + b)
    tops = tl.full([TILE], LOWEST, tl.float32)
    bests = tl.full([TILE], float("-inf"), tl.float32)
    choices = tl.zeros([TILE], tl.int32)
    first = split * part
    for start in range(first, tl.minimum(first + part, V), TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits + b * b_stride + token.to(tl.int64) * v_stride, mask=token < V, other=float("-inf"))
        x = x.to(tl.float32)
        new_tops = tl.maximum(tops, x)
        bests += (tops - new_tops) * inverse
        tops = new_tops
        score = (x - tops) * inverse
        if warm:
            score += gumbel(seed, position, block + start // 4, TILE // 4, WIDEN)
        if CUT:
            key = ordered(x, BITS)
            score = tl.where((key > edge) | ((key == edge) & (token <= last)), score, float("-inf"))
        choices = tl.where(score > bests, token, choices)
        bests = tl.maximum(bests, score)
    top = tl.max(tops)
    bests += (tops - top) * inverse
    best = tl.max(bests)
    choice = tl.min(tl.where(bests == best, choices, V - 1))
    at = b * PARTS + split
    tl.store(part_top + at, tl.where(best > float("-inf"), top, float("-inf")))
    tl.store(part_best + at, best)
    tl.store(part_choice + at, choice)


@triton.jit
def _choose(temperature, tops, scores, tokens, out, t_stride, PARTS: tl.constexpr, BP: tl.constexpr):
    """Best part of row program_id(0)."""
    b, part = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    degrees = tl.load(temperature + b * t_stride).to(tl.float32)
    inverse = tl.minimum(tl.div_rn(1.0, tl.where(degrees > 0, degrees, 1.0)), 3e38)
    top = tl.load(tops + b * PARTS + part, mask=part < PARTS, other=float("-inf"))
    score = tl.load(scores + b * PARTS + part, mask=part < PARTS, other=float("-inf"))
    score = tl.where(top > float("-inf"), score + (top - tl.max(top)) * inverse, float("-inf"))
    tl.store(out + b, tl.load(tokens + b * PARTS + tl.argmax(score, 0)).to(tl.int64))


def sampler(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, seeds: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """The stage `sampler`.

    Args:
        logits: [B, V], fp32, fp16 or bf16, any strides.
        temperature: [B], 0 for the likeliest token.
        top_k: int [B], below 1 cuts nothing; top_p: [B], from 1 on cuts nothing.  The likeliest token is always kept.
        seeds, positions: int [B].

    Returns:
        int64 [B].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    _check(logits, temperature, top_k, top_p, seeds, positions)
    batch, width = logits.shape
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return out
    cut = top_k is not None or top_p is not None
    edges, lasts = (out.new_empty(batch if cut else 0, dtype=kind) for kind in (torch.int64, torch.int32))
    strides = (*logits.stride(), temperature.stride(0))
    with on(logits.device):
        if cut:
            find_cut[(batch,)](
                logits, temperature, temperature if top_k is None else top_k, temperature if top_p is None else top_p,
                edges, lasts, width, *strides, 0 if top_k is None else top_k.stride(0),
                0 if top_p is None else top_p.stride(0), TOP_K=top_k is not None, TOP_P=top_p is not None,
                TILE=64 if interpreting() else 4096, BITS=BITS[NAMES[logits.dtype]], num_warps=8,
            )  # fmt: skip
        tops, scores, tokens = _drawn(logits, temperature, seeds, positions, edges, lasts, cut)
        parts = tops.shape[1]
        _choose[(batch,)](
            temperature, tops, scores, tokens, out, temperature.stride(0), PARTS=parts,
            BP=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return out


def _drawn(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, edges: Tensor, lasts: Tensor, cut: bool,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Largest logit, best score and its token of every part of every row, [B, parts] each."""
    batch, width = logits.shape
    tile = 64 if interpreting() else 2048
    wanted = max(1, 8 * programs_at_once(logits.device) // batch)
    tiles = triton.cdiv(width, tile)
    part = tile * triton.cdiv(tiles, min(wanted, tiles))
    parts = triton.cdiv(width, part)
    tops, scores = torch.empty(2, batch, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    _draw[(batch, parts)](
        logits, temperature, seeds, positions, edges, lasts, tops, scores, tokens, width, part, first // 4,
        *logits.stride(), temperature.stride(0), seeds.stride(0), positions.stride(0),
        CUT=cut, TILE=tile, BITS=BITS[NAMES[logits.dtype]], PARTS=parts, WIDEN=interpreting(),
        num_warps=4,
    )  # fmt: skip
    return tops, scores, tokens


def best_in_shard(
    logits: Tensor, *, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate of one shard of the vocabulary: logits [B, V'] of the tokens from `first`, a multiple of 4.

    Returns:
        tops, scores, tokens [B] as `impls/torch/sampler.py` has them: the best score over all shards, relative to one
        top, is the sampler's token.

    Raises:
        ValueError, TypeError, NotImplementedError: as `sampler`.
    """
    _check(logits, temperature, None, None, seeds, positions)
    if len(logits) == 0:
        empty = torch.empty(0, dtype=torch.float32, device=logits.device)
        return empty, empty.clone(), torch.empty(0, dtype=torch.int64, device=logits.device)
    none = torch.empty(0, dtype=torch.int64, device=logits.device)
    with on(logits.device):
        tops, scores, tokens = _drawn(logits, temperature, seeds, positions, none, none, cut=False, first=first)
    inverse = (1 / torch.where(temperature > 0, temperature.float(), 1)).clamp(max=3e38)
    top = tops.amax(1, keepdim=True)
    scores = torch.where(tops > -torch.inf, scores + (tops - top) * inverse[:, None], -torch.inf)
    best, part = scores.max(1, keepdim=True)
    return top[:, 0], best[:, 0], tokens.gather(1, part)[:, 0].long() + first


sampler.rounds = ()
sampler.deterministic = True
sampler.batch_invariant = True
sampler.graph_capturable = True


def _check(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, seeds: Tensor, positions: Tensor
) -> None:
    """Refuse shapes, dtypes and devices that do not fit."""
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits are {logits.dtype}, but should be fp32, fp16 or bf16")
    if logits.device.type != "cuda" and not interpreting():
        raise NotImplementedError(f"device is {logits.device}, but Triton kernels need CUDA (or TRITON_INTERPRET=1)")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits are {tuple(logits.shape)}, but should be [B, V] with V of at least 1")
    of_rows = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seeds, "positions": positions,
    }  # fmt: skip
    for name, tensor in of_rows.items():
        if tensor is not None and tuple(tensor.shape) != (len(logits),):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {(len(logits),)} as logits have rows")
