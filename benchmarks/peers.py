"""Other ways to compute the same: plain PyTorch, loops over cuBLAS, and libraries that may be absent.

Every function takes inputs of a workload, prepares what is not timed, and returns what is. Imports of libraries stand
inside, so that a missing one is that peer's error and nothing else's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Grads, Inputs, Prepared, Run, Unavailable


def library(name: str) -> Any:
    """A module that need not be installed.

    Raises:
        Unavailable: it does not import.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library may fail at import in any way
        raise Unavailable(f"{name} does not import: {type(error).__name__}: {error}") from error


# Experts over images or tokens: x [n, V, H], w_gate_up [E, 2, I, H], w_down [E, I, H], probs [n, E]; with top-k routing
# also the fields of TopKRouting. All give residual * x + the experts' sum.

_Experts = Sequence[Tensor]
_Forward = Callable[[_Experts, _Experts, _Experts], Tensor]


def _copies(weights: Tensor) -> list[Tensor]:
    return [weight.detach().clone().requires_grad_() for weight in weights]


def _stacked(grads: Grads, like: _Experts) -> Tensor:
    return torch.stack([torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)])


def _ffn(rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(rows, gate)) * F.linear(rows, up)


def _experts_apart(inputs: Inputs, forward: _Forward) -> Prepared:
    """A loop with one parameter for each expert's matrix: slices of the fused ones would cost it their gradients."""
    gates, ups, downs = map(_copies, (inputs["w_gate_up"][:, 0], inputs["w_gate_up"][:, 1], inputs["w_down"]))
    count = len(gates)

    def merge(grads: Grads) -> Grads:
        gate, up, down = (grads[start : start + count] for start in range(1, 3 * count, count))
        w_gate_up = torch.stack([_stacked(gate, gates), _stacked(up, ups)], 1)
        return [grads[0], w_gate_up, _stacked(down, downs), grads[-1]]

    leaves = [inputs["x"], *gates, *ups, *downs, inputs["probs"]]
    return Prepared(run=lambda: (forward(gates, ups, downs),), leaves=leaves, merge=merge)


def naive_loop(inputs: Inputs, residual: float) -> Prepared:
    """The released code's way: a Python loop over samples and, within each, over its experts."""
    x, probs = inputs["x"], inputs["probs"]
    everyone = [list(range(probs.shape[1]))] * len(x)
    chosen = inputs["topk_indices"].tolist() if "topk_indices" in inputs else everyone

    def forward(gates: _Experts, ups: _Experts, downs: _Experts) -> Tensor:
        images = []
        for i, experts in enumerate(chosen):
            y = residual * x[i]
            for e in experts:
                y = y + probs[i, e] * (_ffn(x[i], gates[e], ups[e]) @ downs[e])
            images.append(y)
        return torch.stack(images)

    return _experts_apart(inputs, forward)


def dense_loop(inputs: Inputs, residual: float) -> Prepared:
    """One cuBLAS call for each expert and matrix, over the rows of all images."""
    x, probs = inputs["x"], inputs["probs"]

    def forward(gates: _Experts, ups: _Experts, downs: _Experts) -> Tensor:
        rows, weights = x.flatten(0, 1), probs.to(x.dtype).repeat_interleave(x.shape[1], 0)
        y = residual * rows
        for e, down in enumerate(downs):
            y = torch.addmm(y, _ffn(rows, gates[e], ups[e]) * weights[:, e : e + 1], down)
        return y.view_as(x)

    return _experts_apart(inputs, forward)


def topk_loop(inputs: Inputs, residual: float) -> Prepared:
    """One cuBLAS call for each chosen expert and matrix, over the rows that chose it; the host knows the counts."""
    x, probs = inputs["x"], inputs["probs"]
    source = inputs["plan"] // inputs["topk_indices"].shape[1]
    rows = source.split(inputs["expert_offsets"].diff().tolist())

    def forward(gates: _Experts, ups: _Experts, downs: _Experts) -> Tensor:
        parts = []
        for e, own in enumerate(rows):
            if len(own):
                parts.append((_ffn(x[own], gates[e], ups[e]) * probs[own, e].to(x.dtype)[:, None, None]) @ downs[e])
        return (residual * x).index_add(0, source, torch.cat(parts))

    return _experts_apart(inputs, forward)


def dense_bound(inputs: Inputs) -> Prepared:
    """The products of the dense form alone, as two large ones."""
    w_up, w_down = inputs["w_gate_up"].flatten(0, 2), inputs["w_down"].flatten(0, 1)
    return _two_products(inputs["x"].flatten(0, 1), w_up, w_down)


def topk_bound(inputs: Inputs) -> Prepared:
    """As many operations as the top-k form has, in two products of all its rows with the weights of one expert."""
    x, w_gate_up = inputs["x"], inputs["w_gate_up"]
    rows = x.detach().flatten(0, 1).repeat(inputs["topk_indices"].shape[1], 1)
    return _two_products(rows, w_gate_up[0].flatten(0, 1), inputs["w_down"][0])


def _two_products(rows: Tensor, w_up: Tensor, w_down: Tensor) -> Prepared:
    h = torch.randn(len(rows), len(w_down), device=rows.device, dtype=rows.dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (rows, w_up, h, w_down)]
    return Prepared(run=lambda: (leaves[0] @ leaves[1].T, leaves[2] @ leaves[3]), leaves=leaves)


def grouped_mm_experts(inputs: Inputs, residual: float) -> Run:
    """`F.grouped_mm` twice, with PyTorch's gather, SwiGLU and scatter around it."""
    x, w_gate_up, w_down, probs = (inputs[name] for name in ("x", "w_gate_up", "w_down", "probs"))
    _, num_rows, hidden = x.shape
    source = inputs["plan"] // inputs["topk_indices"].shape[1]
    expert = inputs["topk_indices"].flatten()[inputs["plan"]]
    ends = (inputs["expert_offsets"][1:] * num_rows).int()

    def run() -> tuple[Tensor, ...]:
        z = F.grouped_mm(x[source].flatten(0, 1), w_gate_up.flatten(1, 2).transpose(1, 2), offs=ends)
        gate, up = z.chunk(2, -1)
        weights = probs[source, expert].to(x.dtype).repeat_interleave(num_rows)
        y = F.grouped_mm(F.silu(gate) * up * weights[:, None], w_down, offs=ends)
        return ((residual * x).index_add(0, source, y.view(-1, num_rows, hidden)),)

    return run


def liger_moe(inputs: Inputs) -> Prepared:
    """Liger's fused MoE layer, for tokens; it has no residual."""
    function = library("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    x, probs, indices = inputs["x"], inputs["probs"], inputs["topk_indices"]
    w_up = inputs["w_gate_up"].detach().flatten(1, 2).requires_grad_()
    w_down = inputs["w_down"].detach().transpose(1, 2).contiguous().requires_grad_()
    indices32 = indices.int()

    def run() -> tuple[Tensor, ...]:
        return (function.apply(x.squeeze(1), w_up, w_down, indices32, probs.gather(1, indices)).unsqueeze(1),)

    def merge(grads: Grads) -> Grads:
        grad_x, grad_up, grad_down, grad_probs = grads
        assert grad_up is not None, "Liger gives the gradient of the up-projection"
        assert grad_down is not None, "Liger gives the gradient of the down-projection"
        return [grad_x, grad_up.view_as(inputs["w_gate_up"]), grad_down.transpose(1, 2), grad_probs]

    return Prepared(run=run, leaves=[x, w_up, w_down, probs], merge=merge)


# Grouped products without gradients: a [R, K] rows of all groups, `counts` rows a group, known on the host; w [G, K, N]
# (maybe a transposed view); for weight gradients b [R, N].


def gemm_loop(a: Tensor, w: Tensor, counts: list[int]) -> Run:
    """One cuBLAS call for each group."""
    out = a.new_empty(len(a), w.shape[2])
    groups = list(zip(a.split(counts), w, out.split(counts), strict=True))

    def run() -> tuple[Tensor, ...]:
        for rows, weights, part in groups:
            torch.mm(rows, weights, out=part)
        return (out,)

    return run


def gemm_bound(a: Tensor, w: Tensor, counts: list[int]) -> Run:
    """One cuBLAS product of all rows with one group's weights: as many operations."""
    return lambda: (a @ w[0],)


def gemm_grouped_mm(a: Tensor, w: Tensor, counts: list[int]) -> Run:
    """`F.grouped_mm` with ragged rows."""
    ends = torch.tensor(counts, device=a.device).cumsum(0).int()
    return lambda: (F.grouped_mm(a, w, offs=ends),)


def gemm_deep_gemm(a: Tensor, w: Tensor, counts: list[int]) -> Prepared:
    """DeepGEMM's contiguous layout, its groups padded before the timing."""
    deep_gemm = library("deep_gemm")
    rows, group, _ = _padded_places(a, counts, deep_gemm.get_mk_alignment_for_contiguous_layout())
    padded = a.new_zeros(len(group), a.shape[1])
    padded[rows] = a
    out = a.new_empty(len(group), w.shape[2])
    as_linear = w.transpose(1, 2).is_contiguous()  # [G, N, K]
    call = deep_gemm.m_grouped_bf16_gemm_nt_contiguous if as_linear else deep_gemm.m_grouped_bf16_gemm_nn_contiguous
    weights = w.transpose(1, 2) if as_linear else w

    def run() -> tuple[Tensor, ...]:
        call(padded, weights, out, group)
        return (out,)

    return Prepared(run=run, outputs=lambda outputs: (outputs[0][rows],))


def gemm_triton_kernels(a: Tensor, w: Tensor, counts: list[int]) -> Run:
    """`matmul` of OpenAI's triton_kernels (in Triton's repository; PyPI's triton-kernels is another project)."""
    matmul = library("triton_kernels.matmul").matmul
    ragged = library("triton_kernels.tensor_details.ragged_tensor")
    sizes = torch.tensor(counts, device=a.device, dtype=torch.int32)
    metadata = ragged.make_ragged_tensor_metadata(sizes, len(a))
    return lambda: (matmul(a, w, None, a_ragged_metadata=metadata),)


def wgrad_loop(a: Tensor, b: Tensor, counts: list[int]) -> Run:
    """One cuBLAS call for each group's weight gradient."""
    out = a.new_empty(len(counts), a.shape[1], b.shape[1])
    groups = list(zip(a.split(counts), b.split(counts), out, strict=True))

    def run() -> tuple[Tensor, ...]:
        for left, right, part in groups:
            torch.mm(left.T, right, out=part)
        return (out,)

    return run


def wgrad_bound(a: Tensor, b: Tensor, counts: list[int]) -> Run:
    """One cuBLAS product over the rows of all groups: as many operations, less to write."""
    return lambda: (a.T @ b,)


def wgrad_grouped_mm(a: Tensor, b: Tensor, counts: list[int]) -> Run:
    """`F.grouped_mm` with a ragged inner dimension."""
    ends = torch.tensor(counts, device=a.device).cumsum(0).int()
    return lambda: (F.grouped_mm(a.T, b, offs=ends),)


def wgrad_deep_gemm(a: Tensor, b: Tensor, counts: list[int]) -> Run:
    """DeepGEMM's k-grouped product. It adds to a float32 result, so only its first call gives the weight gradient."""
    deep_gemm = library("deep_gemm")
    rows, group, sizes = _padded_places(a, counts, deep_gemm.get_mk_alignment_for_contiguous_layout())
    left, right = (t.new_zeros(len(group), t.shape[1]) for t in (a, b))
    left[rows], right[rows] = a, b
    sizes_on_device = torch.tensor(sizes, device=a.device, dtype=torch.int32)
    out = torch.zeros(len(counts), a.shape[1], b.shape[1], device=a.device)

    def run() -> tuple[Tensor, ...]:
        deep_gemm.k_grouped_bf16_gemm_tn_contiguous(left, right, out, sizes, sizes_on_device, out)
        return (out,)

    return run


def _padded_places(a: Tensor, counts: list[int], block: int) -> tuple[Tensor, Tensor, list[int]]:
    """Place of each row when groups are padded to a block; group of each place, -1 for padding; padded sizes."""
    sizes = [-(-count // block) * block for count in counts]
    group = torch.full((sum(sizes),), -1, dtype=torch.int32)
    rows, start = [], 0
    for g, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        group[start : start + count] = g
        rows.append(torch.arange(start, start + count))
        start += size
    return torch.cat(rows).to(a.device), group.to(a.device), sizes
