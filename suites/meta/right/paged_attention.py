"""Right paged attention as strangers write it: other orders, other roundings, parts, blocks."""

import torch


def _sequences(q, key_cache, value_cache, table, start, lengths):
    """(rows, queries, keys, values) of every sequence with queries and keys, heads first, keys repeated."""
    page, group = key_cache.shape[1], q.shape[1] // key_cache.shape[2]
    for s, length in enumerate(lengths.tolist()):
        a, b = int(start[s]), int(start[s + 1])
        if a < b and length:
            at = torch.arange(length)
            pages = table[s].long()[at // page]
            keys, values = (
                c[pages, at % page].repeat_interleave(group, 1).transpose(0, 1) for c in (key_cache, value_cache)
            )
            yield slice(a, b), q[a:b].transpose(0, 1), keys, values


def sdpa(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """torch's scaled_dot_product_attention per sequence, in the dtype of the queries."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        count, length = queries.shape[1], keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        result = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, scale=scale
        )
        out[rows] = result[0].transpose(0, 1)
    return out


def _blocks(queries, keys, values, scale, size, kind, base2=False):
    """Running softmax over blocks of `size` keys; weights are rounded to `kind` before they meet the values."""
    count, length = queries.shape[1], keys.shape[1]
    factor = scale * 1.4426950408889634 if base2 else scale
    power = torch.exp2 if base2 else torch.exp
    top = torch.full((*queries.shape[:2], 1), -torch.inf)
    mass, acc = torch.zeros_like(top), torch.zeros(*queries.shape)
    last = torch.arange(length - count, length)[:, None]
    for begin in range(0, length, size):
        block = slice(begin, min(begin + size, length))
        score = queries.float() @ keys[:, block].float().mT * factor
        score = score.masked_fill(torch.arange(block.start, block.stop) > last, -torch.inf)
        new = torch.maximum(top, score.amax(-1, keepdim=True))
        shift = new.masked_fill(new == -torch.inf, 0.0)
        weight, fade = power(score - shift), power(top - shift)
        mass = mass * fade + weight.sum(-1, keepdim=True)
        acc = acc * fade + weight.to(kind).float() @ values[:, block].float()
        top = new
    return acc, top, mass


def running_softmax(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """Blocks of 16 keys, powers of two, weights in the dtype of the values."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        acc, _, mass = _blocks(queries, keys, values, scale, 16, q.dtype, base2=True)
        out[rows] = (acc / mass).transpose(0, 1).to(q.dtype)
    return out


running_softmax.rounds = ("probability",)


def _joined(parts, kind):
    """Parts joined by the logarithms of their sums, each part's result stored in `kind`."""
    results = torch.stack([(acc / mass.clamp(min=1e-38)).to(kind).float() for acc, _, mass in parts])
    logs = torch.stack([top + mass.log() for _, top, mass in parts])
    logs = logs.masked_fill(logs.isnan(), -torch.inf)
    return (torch.softmax(logs, 0) * results).sum(0)


def parts_by_logsumexp(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """Keys in up to four parts, each a running softmax; results of the parts stay in fp32."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        if queries.shape[1] > 1:
            acc, _, mass = _blocks(queries, keys, values, scale, 32, torch.float32)
            out[rows] = (acc / mass).transpose(0, 1).to(q.dtype)
            continue
        size = max(16, -(-keys.shape[1] // 4))
        runs = [slice(a, a + size) for a in range(0, keys.shape[1], size)]
        parts = [_blocks_of_one(queries, keys[:, r], values[:, r], scale) for r in runs]
        out[rows] = _joined(parts, torch.float32).transpose(0, 1).to(q.dtype)
    return out


parts_by_logsumexp.rounds = ()


def _blocks_of_one(queries, keys, values, scale, kind=torch.float32):
    """As `_blocks` for a single query, which sees all keys given."""
    score = queries.float() @ keys.float().mT * scale
    top = score.amax(-1, keepdim=True)
    weight = (score - top).exp()
    return weight.to(kind).float() @ values.float(), top, weight.sum(-1, keepdim=True)


def parts_in_model_dtype(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """As some split kernels do: results of parts are stored in the model's dtype, weights rounded."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        if queries.shape[1] > 1:
            count, length = queries.shape[1], keys.shape[1]
            mask = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
            weights = (queries.float() @ keys.float().mT * scale).masked_fill(mask, -torch.inf).softmax(-1)
            out[rows] = (weights.to(q.dtype).float() @ values.float()).transpose(0, 1).to(q.dtype)
            continue
        runs = [slice(a, a + 24) for a in range(0, keys.shape[1], 24)]
        parts = [_blocks_of_one(queries, keys[:, r], values[:, r], scale, q.dtype) for r in runs]
        out[rows] = _joined(parts, q.dtype).transpose(0, 1).to(q.dtype)
    return out


def sum_of_rounded_weights(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """The sum of weights is taken after they are rounded."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        count, length = queries.shape[1], keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        score = (queries.float() @ keys.float().mT * scale).masked_fill(mask, -torch.inf)
        weights = (score - score.amax(-1, keepdim=True)).exp().to(q.dtype).float()
        out[rows] = (weights @ values.float() / weights.sum(-1, keepdim=True)).transpose(0, 1).to(q.dtype)
    return out


def eager(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """As the model code does: scores rounded to the model's dtype, which has to be declared."""
    out = torch.zeros_like(q).contiguous()
    for rows, queries, keys, values in _sequences(q, key_cache, value_cache, block_table, query_start, context_len):
        count, length = queries.shape[1], keys.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        score = ((queries.float() @ keys.float().mT).to(q.dtype) * scale).masked_fill(mask, -torch.inf)
        weights = score.softmax(-1, dtype=torch.float32).to(q.dtype)
        out[rows] = (weights.float() @ values.float()).transpose(0, 1).to(q.dtype)
    return out


eager.rounds = ("probability", "score")


def decode_only(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    """A kernel for one query a sequence that refuses anything else."""
    if not torch.equal(query_start.long(), torch.arange(len(context_len) + 1)):
        raise NotImplementedError("one query a sequence")
    return running_softmax(q, key_cache, value_cache, block_table, query_start, context_len, scale=scale)
