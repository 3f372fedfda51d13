"""Problems of the attentions, of the LM head and of the linear layers of a step of answers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_paged_layer
from benchmarks.gpu_suite.problems import Case, Make, Problem, Tensors, normal
from benchmarks.workload import Maker
from parrot_sys import ops


def _attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, n, d], weights [n, T, M] and lse [n, T]; rows that see nothing give 0, 0 and -inf."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = torch.einsum("tnd,mnd->ntm", query, keys) * query.shape[-1] ** -0.5
    some = seen.any(1)
    if not seen.shape[1]:
        nothing = scores.sum(-1)
        return query * 0.0 + value.sum() * 0.0, scores, nothing + query.sum(-1).T * 0.0 - math.inf
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(~some[:, None], 0.0)
    weights = scores.softmax(-1) * seen
    lse = scores.logsumexp(-1).masked_fill(~some, -math.inf)
    return torch.einsum("ntm,mnd->tnd", weights, values), weights, lse


def _router_attention(lengths: list[int], heads: int, kv_heads: int, width: int, cached: int = 0) -> Make:
    """Samples with `cached` more keys than queries each."""

    def make(device: torch.device) -> Problem:
        queries, keys = torch.tensor(lengths), torch.tensor(lengths) + cached
        cu_seqlens_q, cu_seqlens_kv = (F.pad(n.cumsum(0), (1, 0)).int().to(device) for n in (queries, keys))
        longest = max(lengths, default=0) + cached

        def places(counts: Tensor, first: int) -> tuple[Tensor, Tensor]:
            """Sample and position of each row."""
            sample = torch.arange(len(counts)).repeat_interleave(counts)
            position = torch.cat([torch.arange(n) + first for n in counts.tolist()] or [torch.empty(0).long()])
            return sample.to(device), position.to(device)

        (sample_q, position_q), (sample_kv, position_kv) = places(queries, cached), places(keys, 0)
        seen = (sample_q[:, None] == sample_kv) & (position_q[:, None] >= position_kv)
        inputs = {
            "query": normal(device, int(queries.sum()), heads, width),
            "key": normal(device, int(keys.sum()), kv_heads, width),
            "value": normal(device, int(keys.sum()), kv_heads, width),
            "columns": normal(device, max(1, longest), 2),
        }

        def op(leaves: Tensors) -> Tensors:
            query, key, value, columns = leaves.values()
            tensors = (query, key, value, columns, cu_seqlens_q, cu_seqlens_kv)
            out, extra, lse = ops.router_attention(
                *tensors, max_seqlen_q=longest - cached, max_seqlen_kv=longest, scale=width**-0.5
            )
            return {"out": out, "extra": extra, "lse": lse}

        def plain(leaves: Tensors) -> Tensors:
            query, key, value, columns = leaves.values()
            out, weights, lse = _attention(query, key, value, seen)
            return {"out": out, "extra": weights.sum(0) @ columns[position_kv], "lse": lse}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _segment_attention(segments: list[tuple[int, int, int]], keys: int, heads: int, kv_heads: int, width: int) -> Make:
    """`segments`: number of query rows, and the first and one past the last key that they see."""

    def make(device: torch.device) -> Problem:
        counts = torch.tensor([n for n, _, _ in segments], dtype=torch.int64)
        start, end = (
            torch.tensor([bounds[i] for bounds in segments], dtype=torch.int32).repeat_interleave(counts).to(device)
            for i in (1, 2)
        )
        places = torch.arange(keys, device=device)
        seen = (places >= start[:, None]) & (places < end[:, None])
        inputs = {
            "query": normal(device, len(start), heads, width),
            "key": normal(device, keys, kv_heads, width),
            "value": normal(device, keys, kv_heads, width),
        }

        def op(leaves: Tensors) -> Tensors:
            query, key, value = leaves.values()
            out, lse = ops.segment_attention(query, key, value, start, end, scale=width**-0.5)
            return {"out": out, "lse": lse}

        def plain(leaves: Tensors) -> Tensors:
            query, key, value = leaves.values()
            out, _, lse = _attention(query, key, value, seen)
            return {"out": out, "lse": lse}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _linear_cross_entropy(rows: int, hidden: int, vocabulary: int) -> Make:
    def make(device: torch.device) -> Problem:
        targets = torch.randint(vocabulary, (rows,)).to(device)
        inputs = {
            "hidden": normal(device, rows, hidden),
            "weight": normal(device, vocabulary, hidden, scale=hidden**-0.5),
        }

        def op(leaves: Tensors) -> Tensors:
            return {"loss": ops.linear_cross_entropy(leaves["hidden"], leaves["weight"], targets)}

        def plain(leaves: Tensors) -> Tensors:
            return {"loss": F.cross_entropy(leaves["hidden"] @ leaves["weight"].T, targets, reduction="none")}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _paged_attention(requests: list[tuple[int, int]], heads: int, groups: int, width: int, block: int = 16) -> Make:
    """Requests of (query rows, rows in the cache), whose blocks lie in no order."""

    def make(device: torch.device) -> Problem:
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        counts = [-(-length // block) for _, length in requests]
        tables = torch.zeros(len(requests), max(counts, default=0), dtype=torch.int32)
        order = torch.randperm(sum(counts))
        for row, (count, own) in enumerate(zip(counts, order.split(counts), strict=True)):
            tables[row, :count] = own
        queries = torch.tensor([0, *(rows for rows, _ in requests)]).cumsum(0).int()
        inputs = {
            "query": normal(device, int(queries[-1]), heads, width),
            "key_cache": normal(device, sum(counts), groups, block, width),
            "value_cache": normal(device, sum(counts), groups, block, width),
        }
        places = (tables.to(device), queries.to(device), lengths.to(device))

        def op(leaves: Tensors) -> Tensors:
            longest = max((rows for rows, _ in requests), default=0)
            return {"out": ops.paged_attention(*leaves.values(), *places, max_seqlen_q=longest, scale=width**-0.5)[0]}

        def plain(leaves: Tensors) -> Tensors:
            query, keys, values = leaves.values()
            outs = [query[:0]]
            for row, (count, length) in enumerate(requests):
                own = query[queries[row] : queries[row + 1]].transpose(0, 1)
                blocks = tables[row, : counts[row]].long().to(device)
                key, value = (
                    cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(heads // groups, 0)
                    for cache in (keys, values)
                )
                hidden = torch.ones(count, length, dtype=torch.bool, device=device).triu(length - count + 1)
                weights = (own @ key.mT * width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
                outs.append((weights @ value).transpose(0, 1))
            return {"out": torch.cat(outs)}

        return Problem(inputs=inputs, op=op, plain=plain, gradients=False)

    return make


def _few_rows_linear(rows: int, depth: int, width: int, *, gated: bool = False) -> Make:
    """With gates before the product, or with a norm before it, and bias and residual after it."""

    def make(device: torch.device) -> Problem:
        inputs = {"x": normal(device, rows, depth * (1 + gated)), "weight": normal(device, width, depth)}
        if not gated:
            inputs |= {"norm": normal(device, depth), "bias": normal(device, width)}
            inputs["residual"] = normal(device, rows, width)

        def op(leaves: Tensors) -> Tensors:
            return {"out": ops.few_rows_linear(**leaves, gated=gated, eps=1e-6)}

        def plain(leaves: Tensors) -> Tensors:
            if gated:
                gate, up = leaves["x"].chunk(2, dim=-1)
                return {"out": F.linear(F.silu(gate) * up, leaves["weight"])}
            normed = F.rms_norm(leaves["x"], (depth,), leaves["norm"], 1e-6)
            return {"out": F.linear(normed, leaves["weight"], leaves["bias"]) + leaves["residual"]}

        return Problem(inputs=inputs, op=op, plain=plain, gradients=False)

    return make


def _paged_layer(answers: int, length: int, groups: int, repeat: int, width: int) -> Make:
    """The next row of answers; what is written is seen by the attention that reads it."""
    shape = bench_paged_layer.Shape(answers, length, 40, groups, repeat, width, 24)

    def make(device: torch.device) -> Problem:
        maker = Maker(device=device, dtype=torch.float64, generator=torch.Generator(device).manual_seed(0))
        tensors = {**bench_paged_layer.make_weights(maker, shape), **bench_paged_layer.make_data(maker, shape)}
        inputs = {name: own for name, own in tensors.items() if own.is_floating_point()}

        def op(leaves: Tensors) -> Tensors:
            return {"out": bench_paged_layer.ours(tensors | leaves)()[0]}

        def plain(leaves: Tensors) -> Tensors:
            return {"out": bench_paged_layer.calls(tensors | leaves)()[0]}

        return Problem(inputs=inputs, op=op, plain=plain, gradients=False)

    return make


def _case(op: str, name: str, make: Make, *, large: bool = False) -> Case:
    return Case(op=op, name=name, make=make, large=large)


_ROWS = [(5, 0, 3), (4, 3, 3), (3, 3, 9), (6, 1, 7)]  # of their own, empty, of their own, overlapping
_LARGE = [(257, 0, 64), (130, 64, 64), (300, 64, 641), (65, 641, 642)]
CASES = [
    _case("router_attention", "primes", _router_attention([5, 1, 7], 3, 3, 16)),
    _case("router_attention", "grouped_heads", _router_attention([6, 0, 3], 4, 2, 16)),
    _case("router_attention", "cached", _router_attention([2, 1], 2, 1, 16, cached=5)),
    _case("router_attention", "nothing", _router_attention([0], 2, 2, 16)),
    _case("router_attention", "wings", _router_attention([300, 129, 64, 1], 4, 4, 128), large=True),
    _case("router_attention", "width_64", _router_attention([257, 190], 4, 2, 64), large=True),
    _case("segment_attention", "ragged", _segment_attention(_ROWS, 9, 2, 2, 16)),
    _case("segment_attention", "grouped_heads", _segment_attention(_ROWS, 9, 4, 1, 16)),
    _case("segment_attention", "no_row", _segment_attention([], 4, 2, 2, 16)),
    _case("segment_attention", "flamingo", _segment_attention(_LARGE, 642, 4, 4, 64), large=True),
    _case("segment_attention", "width_128", _segment_attention(_LARGE, 642, 4, 2, 128), large=True),
    _case("paged_attention", "mixed", _paged_attention([(1, 1), (1, 17), (1, 32), (20, 20), (5, 38)], 2, 1, 16)),
    _case("paged_attention", "grouped_heads", _paged_attention([(1, 33), (3, 20)], 14, 2, 8)),
    _case("paged_attention", "no_row", _paged_attention([(0, 5)], 2, 2, 16)),
    _case("paged_attention", "answers", _paged_attention([(1, 700), (1, 64), (1, 333)], 28, 4, 128), large=True),
    _case("paged_attention", "prompts", _paged_attention([(256, 256), (100, 612)], 8, 8, 64), large=True),
    _case("few_rows_linear", "primes", _few_rows_linear(7, 13, 29)),
    _case("few_rows_linear", "gated", _few_rows_linear(3, 40, 24, gated=True)),
    _case("few_rows_linear", "no_row", _few_rows_linear(0, 8, 5)),
    _case("paged_layer", "answers", _paged_layer(3, 32, 2, 3, 8)),
    _case("paged_layer", "one_head", _paged_layer(1, 16, 1, 1, 2)),
    _case("linear_cross_entropy", "primes", _linear_cross_entropy(7, 13, 97)),
    _case("linear_cross_entropy", "one_row", _linear_cross_entropy(1, 8, 50)),
    _case("linear_cross_entropy", "no_row", _linear_cross_entropy(0, 8, 50)),
    _case("linear_cross_entropy", "vocabulary", _linear_cross_entropy(100, 256, 20_011), large=True),
]
