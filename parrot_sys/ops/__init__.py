"""Differentiable ops: operator + fake + autograd over the launchers of parrot_kernels, with choice of back end."""

from __future__ import annotations

from parrot_sys.ops.expert_mlp import ExpertPlan, expert_mlp
from parrot_sys.ops.few_rows_linear import few_rows_linear
from parrot_sys.ops.grouped_gemm import k_grouped_gemm, m_grouped_gemm, m_grouped_swiglu
from parrot_sys.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_parts
from parrot_sys.ops.paged_attention import paged_attention
from parrot_sys.ops.permute import permute, unpermute
from parrot_sys.ops.registry import force_backend
from parrot_sys.ops.router_attention import router_attention, router_attention_parts
from parrot_sys.ops.segment_attention import segment_attention
from parrot_sys.ops.swiglu import swiglu
from parrot_sys.ops.text_guided_experts import text_guided_experts
from parrot_sys.ops.text_guided_routing import text_guided_routing
from parrot_sys.ops.topk_routing import TopKRouting, topk_routing

__all__ = [
    "ExpertPlan",
    "TopKRouting",
    "expert_mlp",
    "few_rows_linear",
    "force_backend",
    "k_grouped_gemm",
    "linear_cross_entropy",
    "linear_cross_entropy_parts",
    "m_grouped_gemm",
    "m_grouped_swiglu",
    "paged_attention",
    "permute",
    "router_attention",
    "router_attention_parts",
    "segment_attention",
    "swiglu",
    "text_guided_experts",
    "text_guided_routing",
    "topk_routing",
    "unpermute",
]
