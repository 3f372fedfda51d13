"""Problems of routing, experts, grouped products, permutation and SwiGLU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_suite.problems import Case, Make, Problem, Tensors, normal, wide
from parrot_kernels.fp8_experts.reference import rounded_rows, rounded_weights
from parrot_kernels.testing import make_spans
from parrot_sys import ops


def _text_guided_routing(lengths: list[int], images: list[int], hidden: int, experts: int) -> Make:
    def make(device: torch.device) -> Problem:
        start, end = (span.to(device) for span in make_spans(lengths, images))
        inputs = {
            "query": normal(device, len(start), hidden),
            "text": normal(device, sum(lengths), hidden),
            "router_weight": normal(device, experts, hidden, scale=hidden**-0.5),
        }

        def op(leaves: Tensors) -> Tensors:
            query, text, weight = leaves.values()
            logits, lse = ops.text_guided_routing(query, text, start, end, weight, scale=hidden**-0.5)
            return {"logits": logits, "lse": lse}

        def plain(leaves: Tensors) -> Tensors:
            query, text, weight = leaves.values()
            rows = torch.arange(len(text), device=device)
            seen = (rows >= start[:, None]) & (rows < end[:, None])
            scores = (query @ text.T * hidden**-0.5).masked_fill(~seen, -math.inf)
            some = seen.any(1, keepdim=True)
            attention = scores.masked_fill(~some, 0.0).softmax(-1) * seen if len(text) else scores
            lse = scores.masked_fill(~some, 0.0).logsumexp(-1) if len(text) else query.sum(1) * 0.0
            return {"logits": (attention @ text) @ weight.T, "lse": lse.masked_fill(~some[:, 0], -math.inf)}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _topk_routing(rows: int, experts: int, topk: int, *, ties: bool = False, groups: int = 0) -> Make:
    """Softmax with renormalised weights; with `groups` the router of DeepSeek-V3, half of the groups allowed."""

    def make(device: torch.device) -> Problem:
        logits = normal(device, rows, experts)
        logits = logits.round() if ties else logits
        options: dict[str, Any] = {"renormalize": True}
        bias = normal(device, experts, scale=0.3) if groups else None
        if bias is not None:
            options |= {"score_function": "sigmoid", "scaling_factor": 2.5, "expert_bias": bias.float()}
            options |= {"num_groups": groups, "topk_groups": groups // 2}

        def chosen(values: Tensor) -> Tensor:
            """[n, K], best first, of equal ones the smaller index; always from float64, so that all choose alike."""
            ranked = values.detach().double()
            if bias is not None:
                ranked = ranked.sigmoid() + bias.float().double()
                by_group = ranked.view(rows, groups, -1)
                best = by_group.topk(max(1, topk // (groups // 2)), 2).values.sum(2)
                allowed = best.argsort(dim=1, descending=True, stable=True)[:, : groups // 2]
                mask = torch.zeros_like(best).scatter(1, allowed, 1.0)[:, :, None].bool()
                ranked = by_group.masked_fill(~mask, -math.inf).flatten(1)
            return ranked.argsort(dim=1, descending=True, stable=True)[:, :topk]

        def op(leaves: Tensors) -> Tensors:
            route = ops.topk_routing(leaves["logits"], topk, **options)
            return {name: getattr(route, name) for name in ("probs", "scores", "lse", "score_sums", "z_sum")}

        def plain(leaves: Tensors) -> Tensors:
            values = leaves["logits"]
            indices, lse = chosen(values), values.logsumexp(-1)
            scores = values.sigmoid() if groups else values.softmax(-1)
            weights = scores.gather(1, indices)
            weights = weights / weights.sum(1, keepdim=True) * options.get("scaling_factor", 1.0)
            shares = scores / scores.sum(1, keepdim=True) if groups else scores
            probs = torch.zeros_like(scores).scatter(1, indices, weights)
            sums = {"score_sums": shares.sum(0), "z_sum": lse.square().sum()}
            return {"probs": probs, "scores": scores, "lse": lse, **sums}

        def exact() -> dict[str, tuple[Tensor, Tensor]]:
            route = ops.topk_routing(logits.float(), topk, **options)
            flat = chosen(logits.float()).flatten()
            counts = torch.bincount(flat, minlength=experts)
            return {
                "topk_indices": (route.topk_indices.flatten(), flat),
                "tokens_per_expert": (route.tokens_per_expert.long(), counts),
                "expert_offsets": (route.expert_offsets.long(), F.pad(counts.cumsum(0), (1, 0))),
                "plan": (route.plan, flat.argsort(stable=True)),
            }

        return Problem(inputs={"logits": logits}, op=op, plain=plain, exact=exact)

    return make


def _route(device: torch.device, rows: int, experts: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random topk_indices, expert_offsets and plan."""
    indices = torch.rand(rows, experts).argsort(1)[:, :topk].contiguous()  # as topk_routing gives them
    offsets = F.pad(torch.bincount(indices.flatten(), minlength=experts).cumsum(0), (1, 0)).int()
    return indices.to(device), offsets.to(device), indices.flatten().argsort(stable=True).to(device)


def _expert_mlp(n: int, rows: int, hidden: int, experts: int, ffn: int, topk: int = 0, **options: bool) -> Make:
    """Dense with topk = 0."""

    def make(device: torch.device) -> Problem:
        inputs = {
            "x": normal(device, n, rows, hidden),
            "w_gate_up": normal(device, experts, 2, ffn, hidden, scale=hidden**-0.5),
            "w_down": normal(device, experts, ffn, hidden, scale=ffn**-0.5),
            "probs": torch.rand(n, experts, dtype=torch.float64).to(device),
        }
        plan, mask = None, torch.ones(n, experts, dtype=torch.bool, device=device)
        if topk:
            indices, offsets, positions = _route(device, n, experts, topk)
            nothing = dict.fromkeys(ops.TopKRouting._fields, torch.empty(0, device=device))
            used = {"topk_indices": indices, "expert_offsets": offsets, "plan": positions}
            plan = ops.TopKRouting(**(nothing | used))
            mask = torch.zeros_like(mask).scatter(1, indices, True)

        def op(leaves: Tensors) -> Tensors:
            x, w_gate_up, w_down, probs = leaves.values()
            y = ops.expert_mlp(
                x, w_gate_up, w_down, wide(probs), plan=plan, residual_scale=0.3, output_scale=0.7, **options
            )
            return {"y": y}

        def plain(leaves: Tensors) -> Tensors:
            x, w_gate_up, w_down, probs = leaves.values()
            gate, up = torch.einsum("nvh,ecih->cnevi", x, w_gate_up)
            h = F.silu(gate) * up * (probs * mask)[:, :, None, None]
            return {"y": 0.3 * x + 0.7 * torch.einsum("nevi,eih->nvh", h, w_down)}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _grouped(
    kind: str, counts: list[int], rows: int, depth: int, width: int, *, gathered: bool = False, padding: int = 0
) -> Make:
    """`counts` segments of `rows` rows in each group, then `padding` segments in none."""

    def make(device: torch.device) -> Problem:
        groups, segments = len(counts), sum(counts) + padding
        offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
        bounds = offsets.tolist()
        plan = torch.randperm(2 * segments)[:segments].to(device) if gathered else None
        source = torch.arange(segments, device=device) if plan is None else plan // 2
        topk = 1 if plan is None else 2

        def by_group(tensor: Tensor) -> list[Tensor]:
            return [tensor[first:last] for first, last in itertools.pairwise(bounds)]

        def products(x: Tensor, weights: Tensor) -> Tensor:
            parts = [part @ w.T for part, w in zip(by_group(x[source]), weights, strict=True)]
            return torch.cat([*parts, x.new_zeros(padding, rows, weights.shape[1])])

        def op(leaves: Tensors) -> Tensors:
            if kind == "wgrad":
                return {"c": ops.k_grouped_gemm(leaves["a"], leaves["x"], offsets, plan=plan, topk=topk)}
            if kind == "swiglu":
                x, w_gate_up, weights = leaves.values()
                return {"h": ops.m_grouped_swiglu(x, w_gate_up, offsets, weights=wide(weights), plan=plan, topk=topk)}
            x, w = leaves.values()
            return {"y": ops.m_grouped_gemm(x, w, offsets, plan=plan, topk=topk, trans_w=kind == "gemm")}

        def plain(leaves: Tensors) -> Tensors:
            if kind == "wgrad":
                pairs = zip(by_group(leaves["a"]), by_group(leaves["x"][source]), strict=True)
                return {"c": torch.stack([a.flatten(0, 1).T @ x.flatten(0, 1) for a, x in pairs])}
            if kind == "swiglu":
                x, w_gate_up, weights = leaves.values()
                gate, up = products(x, w_gate_up.flatten(1, 2)).chunk(2, -1)
                return {"h": F.silu(gate) * up * weights[:, None, None]}
            x, w = leaves.values()
            return {"y": products(x, w if kind == "gemm" else w.transpose(1, 2))}

        x = normal(device, segments, rows, depth)
        if kind == "wgrad":
            inputs = {"a": normal(device, segments, rows, width), "x": x}
        elif kind == "swiglu":
            weights = torch.rand(segments, dtype=torch.float64).to(device)
            inputs = {
                "x": x,
                "w_gate_up": normal(device, groups, 2, width, depth, scale=depth**-0.5),
                "weights": weights,
            }
        else:
            sizes = (width, depth) if kind == "gemm" else (depth, width)
            inputs = {"x": x, "w": normal(device, groups, *sizes, scale=depth**-0.5)}
        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _swiglu(segments: int, rows: int, width: int, *, weighted: bool = True) -> Make:
    def make(device: torch.device) -> Problem:
        inputs = {"z": normal(device, segments, rows, 2, width, scale=3.0)}
        if weighted:
            inputs["weights"] = normal(device, segments)

        def op(leaves: Tensors) -> Tensors:
            return {"h": ops.swiglu(leaves["z"], wide(leaves["weights"]) if weighted else None)}

        def plain(leaves: Tensors) -> Tensors:
            gate, up = leaves["z"].unbind(2)
            h = F.silu(gate) * up
            return {"h": h * leaves["weights"][:, None, None] if weighted else h}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _permute(rows: int, width: int, topk: int, dropped: int = 0) -> Make:
    def make(device: torch.device) -> Problem:
        plan = torch.randperm(rows * topk)[: rows * topk - dropped].to(device)
        probs = torch.rand(rows, topk, dtype=torch.float64).to(device)

        def op(leaves: Tensors) -> Tensors:
            moved, row_probs = ops.permute(leaves["x"], plan, topk=topk, probs=wide(leaves["probs"]))
            assert row_probs is not None, "probabilities were given"
            return {"rows": moved, "row_probs": row_probs}

        def plain(leaves: Tensors) -> Tensors:
            return {"rows": leaves["x"][plan // topk], "row_probs": wide(leaves["probs"]).flatten()[plan]}

        return Problem(inputs={"x": normal(device, rows, width), "probs": probs}, op=op, plain=plain)

    return make


def _unpermute(rows: int, width: int, topk: int, dropped: int = 0, *, weighted: bool = True) -> Make:
    def make(device: torch.device) -> Problem:
        plan = torch.randperm(rows * topk)[: rows * topk - dropped].to(device)
        inputs = {"rows": normal(device, len(plan), width)}
        if weighted:
            inputs["probs"] = torch.rand(rows, topk, dtype=torch.float64).to(device)

        def op(leaves: Tensors) -> Tensors:
            probs = wide(leaves["probs"]) if weighted else None
            return {"y": ops.unpermute(leaves["rows"], plan, topk=topk, num_rows=rows, probs=probs)}

        def plain(leaves: Tensors) -> Tensors:
            own = leaves["rows"]
            own = own * leaves["probs"].flatten()[plan, None] if weighted else own
            return {"y": own.new_zeros(rows, width).index_add(0, plan // topk, own)}

        return Problem(inputs=inputs, op=op, plain=plain)

    return make


def _fp8_product(counts: list[int], rows: int, depth: int, width: int, *, trans_w: bool = True) -> Make:
    """Against the product of the operands as they are quantised, which float8 must add up like any other numbers."""

    def make(device: torch.device) -> Problem:
        offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
        bounds = list(itertools.pairwise(offsets.tolist()))
        sizes = (width, depth) if trans_w else (depth, width)
        inputs = {
            "x": normal(device, sum(counts), rows, depth),
            "w": normal(device, len(counts), *sizes, scale=depth**-0.5),
        }

        def op(leaves: Tensors) -> Tensors:
            return {"y": ops.m_grouped_gemm(*leaves.values(), offsets, trans_w=trans_w, fp8=True)}

        def plain(leaves: Tensors) -> Tensors:
            x, w = rounded_rows(leaves["x"]).to(leaves["x"]), rounded_weights(leaves["w"]).to(leaves["w"])
            parts = [x[first:last] @ (own.T if trans_w else own) for (first, last), own in zip(bounds, w, strict=True)]
            return {"y": torch.cat(parts)}

        return Problem(inputs=inputs, op=op, plain=plain, gradients=False)

    return make


def _case(op: str, name: str, make: Make, *, large: bool = False) -> Case:
    return Case(op=op, name=name, make=make, large=large)


def _fp8_case(name: str, make: Make, *, large: bool = False) -> Case:
    """In bfloat16 only: tensor cores add up float8 with fewer bits than float32 has."""
    return Case(op="fp8_experts", name=name, make=make, large=large, dtypes=("bf16",))


CASES = [
    _case("text_guided_routing", "primes", _text_guided_routing([5, 11, 3], [1, 2, 1], 13, 5)),
    _case("text_guided_routing", "empty_span", _text_guided_routing([6, 0, 5], [1, 1, 2], 16, 6)),
    _case("text_guided_routing", "no_text", _text_guided_routing([0], [2], 8, 3)),
    _case("text_guided_routing", "no_image", _text_guided_routing([4], [0], 8, 3)),
    _case("text_guided_routing", "parrot", _text_guided_routing([128, 60, 1, 300], [1, 3, 1, 2], 4096, 6), large=True),
    _case("topk_routing", "primes", _topk_routing(7, 5, 3)),
    _case("topk_routing", "one_row", _topk_routing(1, 6, 1)),
    _case("topk_routing", "all_experts", _topk_routing(9, 4, 4)),
    _case("topk_routing", "ties", _topk_routing(33, 8, 2, ties=True)),
    _case("topk_routing", "groups", _topk_routing(21, 16, 4, groups=4)),
    _case("topk_routing", "deepseek_v3", _topk_routing(1025, 256, 8, groups=8), large=True),
    _case("topk_routing", "no_row", _topk_routing(0, 6, 2)),
    _case("topk_routing", "tokens", _topk_routing(4099, 256, 8), large=True),
    _case("expert_mlp", "dense_primes", _expert_mlp(3, 7, 13, 5, 11)),
    _case("expert_mlp", "dense_recompute", _expert_mlp(2, 5, 16, 3, 40, recompute=True)),
    _case("expert_mlp", "dense_no_image", _expert_mlp(0, 7, 16, 2, 8)),
    _case("expert_mlp", "dense_parrot", _expert_mlp(2, 577, 512, 6, 384), large=True),
    _case("expert_mlp", "top2_primes", _expert_mlp(5, 7, 13, 5, 11, topk=2)),
    _case("expert_mlp", "top1_unused_experts", _expert_mlp(2, 9, 16, 6, 40, topk=1)),
    _case("expert_mlp", "top2_images", _expert_mlp(3, 70, 72, 5, 40, topk=2)),
    _case("expert_mlp", "all_chosen", _expert_mlp(3, 1, 16, 4, 8, topk=4)),
    _case("expert_mlp", "top2_no_image", _expert_mlp(0, 7, 16, 4, 8, topk=2)),
    _case("expert_mlp", "top2_parrot", _expert_mlp(4, 577, 512, 6, 384, topk=2), large=True),
    _case("grouped_gemm", "empty_group", _grouped("gemm", [2, 0, 3], 7, 19, 23)),
    _case("grouped_gemm", "all_to_one", _grouped("gemm", [0, 9, 0], 1, 16, 24)),
    _case("grouped_gemm", "padding", _grouped("gemm_nn", [3, 1], 5, 32, 16, padding=2)),
    _case("grouped_gemm", "nothing", _grouped("gemm", [0, 0], 3, 16, 16)),
    _case("grouped_gemm", "planned", _grouped("gemm", [4, 1, 6], 1, 16, 40, gathered=True)),
    _case("grouped_gemm", "segments", _grouped("gemm", [1, 3, 0, 2], 577, 512, 768), large=True),
    _case("grouped_gemm", "segments_nn", _grouped("gemm_nn", [1, 3, 0, 2], 577, 512, 768), large=True),
    _case("grouped_gemm", "tokens", _grouped("gemm", [130, 1, 0, 257, 64], 1, 512, 256, gathered=True), large=True),
    _case("grouped_gemm", "swiglu_primes", _grouped("swiglu", [2, 0, 3], 7, 19, 23)),
    _case("grouped_gemm", "swiglu_planned", _grouped("swiglu", [4, 1, 6], 3, 16, 40, gathered=True, padding=1)),
    _case("grouped_gemm", "swiglu_segments", _grouped("swiglu", [2, 2], 577, 512, 384, gathered=True), large=True),
    _case("grouped_gemm", "wgrad_primes", _grouped("wgrad", [2, 0, 3], 7, 19, 23)),
    _case("grouped_gemm", "wgrad_planned", _grouped("wgrad", [4, 1, 6], 3, 16, 40, gathered=True, padding=1)),
    _case("grouped_gemm", "wgrad_segments", _grouped("wgrad", [1, 3, 0, 2], 577, 512, 768), large=True),
    _fp8_case("two_blocks", _fp8_product([2, 0, 3], 7, 144, 32)),
    _fp8_case("transposed", _fp8_product([1, 2], 5, 144, 48, trans_w=False)),
    _fp8_case("parrot", _fp8_product([1, 3, 0, 2], 577, 4096, 1024), large=True),
    _case("swiglu", "tokens", _swiglu(7, 1, 40)),
    _case("swiglu", "images", _swiglu(2, 5, 13)),
    _case("swiglu", "unweighted", _swiglu(3, 1, 33, weighted=False)),
    _case("swiglu", "none", _swiglu(0, 3, 8)),
    _case("swiglu", "wide", _swiglu(64, 1, 13_696), large=True),
    _case("permute", "primes", _permute(7, 13, 3)),
    _case("permute", "dropped", _permute(8, 16, 3, dropped=5)),
    _case("permute", "no_row", _permute(0, 8, 2)),
    _case("permute", "tokens", _permute(500, 2048, 8), large=True),
    _case("permute", "unpermute_primes", _unpermute(7, 13, 3)),
    _case("permute", "unpermute_all_dropped", _unpermute(4, 8, 2, dropped=8)),
    _case("permute", "unpermute_sum", _unpermute(9, 16, 2, dropped=1, weighted=False)),
    _case("permute", "unpermute_tokens", _unpermute(500, 2048, 8), large=True),
]
