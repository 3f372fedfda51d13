"""Contract of `fp8_experts`: forward passes of `expert_mlp` and `grouped_gemm` whose products take float8 operands.

Numbers are e4m3 (three bits of mantissa, largest 448) with float32 scales, as in DeepGEMM: one scale for each row and
128 columns of x and h, one for each 128 x 128 block of a matrix of weights. A scale is the largest magnitude of its
block over 448 (1 for a block of zeros), in IEEE division, and an element is the quotient by it, rounded to nearest
even. Columns of a product's sum are cut into blocks from the first one on; the last may be shorter.

    quantize_rows(x)                 x [..., K] -> q [..., K] float8_e4m3fn, scales [..., K / 128] float32
    quantize_weights(w, transposed)  w [P, A, B] -> q [P, N, K], scales [P, N / 128, K / 128], both rounded up;
                                     N, K = A, B, or with `transposed` B, A: sums run over the last dimension
Both give the same bits in every back end.

Every product adds up in float32 what the quantised operands give, as `expert_mlp` and `grouped_gemm` do; but tensor
cores of sm_90 keep only some 14 bits of a sum of float8 products (DeepSeek-V3, arXiv 2412.19437), which is why sums
leave them after each block of 128. h is rounded to the dtype of x and then quantised; z, y and the residual are not.

With
    d(v) = 2^-4 |v| + 2^-10 s        (s the scale of the block of v)
no element of x @ w is further from the exact product than d(x) @ |w| + |x| @ d(w) + d(x) @ d(w), beside the rounding of
sums and result: half a unit in the last place for normal numbers, and half of 2^-9 for those below 2^-6.

The backward passes are those of `expert_mlp` and `grouped_gemm`, in the dtype of x.

Launchers (arguments as in `expert_mlp` and `grouped_gemm`; tensors in float32, bfloat16 or float16):
    quantize_rows, quantize_weights
    m_grouped_gemm(x, w, offsets, plan, topk, trans_w) -> y
    m_grouped_swiglu(x, w_gate_up, offsets, plan, topk, weights, save_z) -> (h, z)
    expert_mlp_dense_fwd(x, w_gate_up, w_down, probs, scales, save_z) -> (y, z)
    expert_mlp_topk_fwd(x, w_gate_up, w_down, probs, topk_indices, expert_offsets, plan, scales, save_z) -> (y, z)
    why_not(*args)
"""
